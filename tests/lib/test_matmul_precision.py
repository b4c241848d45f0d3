"""The precision of float32 products: the caller's in f, all digits in the methods."""

import threading
from functools import partial
from importlib import import_module

import pytest
import torch

import lib.solvers.krylov
from lib.solvers import ADJOINT_SOLVERS, SOLVERS, anderson, broyden
from lib.solvers.maps import Affine
from lib.solvers.precision import callers_products

# The functions of the same names hide the modules as attributes of lib.solvers.
anderson_py = import_module("lib.solvers.anderson")
broyden_py = import_module("lib.solvers.broyden")

EVERY = SOLVERS | ADJOINT_SOLVERS | {"broyden of few": partial(broyden, memory=3)}
by_name = pytest.mark.parametrize("name", EVERY)
by_setting = pytest.mark.parametrize("setting", ["highest", "high", "medium"])


@pytest.fixture(autouse=True)
def unchanged():
    """What the process is set to, before and after."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def get():
    return torch.get_float32_matmul_precision()


@by_name
@by_setting
def test_the_callers_setting_holds_in_f_alone(name, setting, monkeypatch):
    """Seen by f, and by products with its Jacobian; by no product of the method's own."""
    torch.set_float32_matmul_precision(setting)
    in_f, in_method = [], []

    def spy(module, function):
        original = getattr(module, function)

        def spied(*args, **options):
            in_method.append(get())
            return original(*args, **options)

        monkeypatch.setattr(module, function, spied)

    spy(anderson_py, "products")
    spy(broyden_py, "products")
    spy(lib.solvers.krylov, "_unit")
    spy(lib.solvers.krylov, "_dot")

    def f(z):
        in_f.append(get())
        return torch.cos(z) if name not in ("gmres", "bicgstab") else 0.5 * z + 1

    solution = EVERY[name](f, torch.zeros(2, 3), eps=1e-5)
    assert solution["converged"].all()
    assert set(in_f) == {setting}
    assert set(in_method) <= {"highest"}
    assert in_method or name == "fixed_point_iteration"
    assert get() == setting


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "broyden"])
@by_setting
def test_of_an_affine_map_too(name, setting):
    torch.set_float32_matmul_precision(setting)
    seen = []

    def product(v):
        seen.append(get())
        return 0.5 * v

    zero = torch.zeros(2, 3)
    solution = EVERY[name](Affine(product, zero + 1, zero), zero, eps=1e-5)
    assert solution["converged"].all()
    assert set(seen) == {setting}
    assert get() == setting


class Watched(torch.autograd.Function):
    """Twice z, noting the setting under which it is differentiated."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, grad):
        Watched.seen.append(get())
        return 2 * grad


@by_setting
def test_newton_differentiates_under_the_callers_setting(setting):
    torch.set_float32_matmul_precision(setting)
    Watched.seen.clear()
    solution = SOLVERS["newton_krylov"](lambda z: Watched.apply(z) + 1, torch.zeros(2, 3), eps=1e-5)
    assert solution["products"] > 0
    assert solution["converged"].all()
    assert set(Watched.seen) == {setting}


@by_name
def test_an_error_leaves_the_setting_as_it_was(name):
    torch.set_float32_matmul_precision("high")

    def f(z):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        EVERY[name](f, torch.zeros(2, 3))
    assert get() == "high"
    with pytest.raises(ValueError, match="threshold"):
        EVERY[name](torch.cos, torch.zeros(2, 3), threshold=0)
    assert get() == "high"


def test_a_solve_within_f():
    torch.set_float32_matmul_precision("high")
    seen = []

    def f(z):
        seen.append(get())
        inner = anderson(lambda y: 0.5 * y + z, z, eps=1e-5)["result"]
        seen.append(get())
        return 0.1 * inner

    anderson(f, torch.ones(2, 3), threshold=4, eps=0.0)
    assert set(seen) == {"high"}
    assert get() == "high"


def test_solves_in_two_threads():
    """Their ends cross: the last one leaves what the first one found."""
    torch.set_float32_matmul_precision("high")
    one_begun, seen = threading.Event(), {1: [], 2: []}

    def solve(number, wait_for, tell):
        def f(z):
            seen[number].append(get())
            tell.set()
            assert wait_for.wait(30)
            return torch.cos(z)

        anderson(f, torch.zeros(1, 2), eps=1e-4)

    begun = threading.Event()
    two = threading.Thread(target=solve, args=(2, one_begun, begun))
    one = threading.Thread(target=solve, args=(1, begun, one_begun))
    two.start()
    one.start()
    for thread in (one, two):
        thread.join(30)
    assert seen[1]
    assert seen[2]
    assert get() == "high"


def test_torchs_newer_name_for_the_setting(monkeypatch):
    matmul, seen, original = torch.backends.cuda.matmul, [], anderson_py.products
    before = matmul.fp32_precision

    def products(*args):
        seen.append(("method", matmul.fp32_precision))
        return original(*args)

    def f(z):
        seen.append(("f", matmul.fp32_precision))
        return torch.cos(z)

    monkeypatch.setattr(anderson_py, "products", products)
    try:
        matmul.fp32_precision = "tf32"
        anderson(f, torch.zeros(2, 3))
        assert set(seen) == {("f", "tf32"), ("method", "ieee")}
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_outside_of_a_solve_there_is_nothing_to_do():
    for setting in ("high", "highest"):
        torch.set_float32_matmul_precision(setting)
        with callers_products():
            assert get() == setting
        assert get() == setting
