"""What the solvers spend beside f: transfers to the host, memory; and iterates in float32."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.solvers import SOLVERS, anderson, broyden, norms
from lib.solvers.stats import all_finite, solve_figures
from problems import NanFrom, symmetric, tanh_layer

# Newton's method waits for its inner solves.
by_name = pytest.mark.parametrize("name", [n for n in SOLVERS if n != "newton_krylov"])


# --- One transfer per check -------------------------------------------------------------------


class Transfers:
    """Counts what would make the host wait for a GPU."""

    NAMES = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero")

    def __init__(self, monkeypatch):
        self.counts = dict.fromkeys(self.NAMES, 0)
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._counting(name))

    def _counting(self, name):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.counts[name] += 1
            return original(tensor, *args, **kwargs)

        return counted


@by_name
@pytest.mark.parametrize("check_every", [1, 4])
def test_one_transfer_per_check(name, check_every, monkeypatch):
    problem = tanh_layer()
    transfers = Transfers(monkeypatch)
    solve = partial(SOLVERS[name], problem.f, problem.x0, eps=0.0, check_every=check_every)
    nfe = solve(threshold=17)["nfe"]
    # The first is at x0, whose residual says how large those that follow may be.
    checks = 1 + math.ceil((nfe - 1) / check_every)
    expected = dict.fromkeys(Transfers.NAMES, 0) | {"cpu": checks, "numpy": checks}
    assert transfers.counts == expected


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("stop", ["batch", "sample"])
def test_figures_of_a_solve_read_nothing_from_the_device(name, stop, monkeypatch):
    problem = tanh_layer()
    solution = SOLVERS[name](problem.f, problem.x0, stop=stop)
    lost = SOLVERS[name](NanFrom(problem.f, sample=1, call=0), problem.x0, stop=stop)
    transfers = Transfers(monkeypatch)
    assert not solve_figures(solution)["broken"]
    assert all_finite(solution)
    assert solve_figures(lost)["broken"]
    assert not all_finite(lost)
    assert not any(transfers.counts.values())
    # A user's own solver may hand back the tensor alone, or neither.
    assert not all_finite({"finite": torch.tensor([True, False])})
    assert all_finite({"finite": torch.tensor([True, True])})
    assert all_finite({})


@by_name
@pytest.mark.parametrize("check_every", [2, 5, 100])
def test_rarer_checks_change_nothing_but_when_to_stop(name, check_every):
    problem = tanh_layer()
    solve = partial(SOLVERS[name], problem.f, problem.x0, threshold=40)
    often, rarely = solve(eps=0.0), solve(eps=0.0, check_every=check_every)
    assert rarely["abs_trace"] == often["abs_trace"]
    assert torch.equal(rarely["result"], often["result"])
    assert rarely["nstep"] == often["nstep"]

    often, rarely = solve(eps=1e-6), solve(eps=1e-6, check_every=check_every)
    assert 0 <= rarely["nfe"] - often["nfe"] < check_every
    assert rarely["rel_trace"][: often["nfe"]] == often["rel_trace"]
    assert rarely["lowest"] <= often["lowest"] < 1e-6


@by_name
@pytest.mark.parametrize("check_every", [3, 7])
@pytest.mark.parametrize("call", [2, 5])
def test_nan_between_checks_stays_with_its_sample(name, check_every, call):
    problem = tanh_layer()
    options = {"threshold": 30, "eps": 1e-9}
    f = NanFrom(problem.f, sample=1, call=call)
    solution = SOLVERS[name](f, problem.x0, check_every=check_every, **options)
    assert solution["finite"].tolist() == [True, False, True]
    assert torch.isfinite(solution["result"]).all()
    alone = SOLVERS[name](NanFrom(problem.f, sample=1, call=call), problem.x0, **options)
    torch.testing.assert_close(solution["result"], alone["result"], rtol=0, atol=1e-8)
    # The lost sample's best finite iterate, the same as with a check at every evaluation.
    assert torch.equal(solution["result"][1], alone["result"][1])


def test_a_line_search_checks_always():
    problem = tanh_layer()
    options = {"threshold": 10, "eps": 1e-9, "ls": True}
    often = broyden(problem.f, problem.x0, **options)
    rarely = broyden(problem.f, problem.x0, check_every=5, **options)
    assert rarely["abs_trace"] == often["abs_trace"]


@by_name
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_floor_ends_a_solve_in_either_mode(name, stop_mode):
    problem = tanh_layer()
    solve = partial(SOLVERS[name], problem.f, problem.x0, eps=1e-9, stop_mode=stop_mode)
    solution = solve(floor=1e-3)
    assert solution["rel_trace"][-1] < 1e-3 <= min(solution["rel_trace"][:-1])
    assert not solution["converged"].any()
    assert not solution["prot_break"]
    assert solve(floor=0.0)["nfe"] > solution["nfe"]


# --- Memory -----------------------------------------------------------------------------------


class LargestTensors(TorchDispatchMode):
    """Bytes of each new storage of at least ``least`` bytes."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.seen = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= self.least:
            storage = out.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
        return out


def test_broyden_sets_aside_no_more_than_it_uses():
    """A solve that ends early does not pay for its threshold."""
    x0 = torch.zeros(2, 200_000)
    w = torch.linspace(-0.5, 0.5, 200_000)
    with LargestTensors(4 * x0.nbytes) as tensors:
        solution = broyden(lambda z: w * z + 1, x0, threshold=1000, eps=1e-3)
    assert solution["converged"].all()
    assert solution["nfe"] < 9
    assert sum(tensors.seen.values()) <= 8 * x0.nbytes  # one block of directions


def test_broyden_block_ends_at_the_threshold():
    x0 = torch.zeros(2, 200_000)
    w = torch.linspace(-0.9, 0.9, 200_000)
    for threshold, rows in ((3, 3), (10, 8), (11, 8)):
        with LargestTensors(3 * x0.nbytes) as tensors:
            broyden(lambda z: w * z + 1, x0, threshold=threshold, eps=0.0)
        assert max(tensors.seen.values()) == rows * x0.nbytes


# --- Inner products ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 4096, 8192, 12_289, 105_000])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2])
def test_products(size, rows, count):
    generator = torch.Generator().manual_seed(size + rows)
    vectors = torch.randn(count, 3, size, generator=generator)
    stored = torch.randn(rows, 3, size, generator=generator)
    found = norms.products(vectors, stored)
    assert found.dtype == torch.float64
    expected = torch.einsum("vbd,rbd->bvr", vectors.double(), stored.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * size**0.5)


def test_chunks_divide():
    for size in (1, 4095, 4097, 8192, 12_289, 30_720, 105_000, 400_000):
        chunks = norms.chunks(size)
        assert size % chunks == 0
        assert chunks == 1 or size // chunks >= 512
        assert size > 4096 or chunks == 1


# --- Iterates in float32 and float64 against what they replace ----------------------------------


@pytest.mark.parametrize("solver", [anderson, broyden])
def test_float32_at_spectral_radius_099(solver):
    """Steps and residuals there are far from orthogonal, so lost digits would show."""
    problem = symmetric((4, 400), radius=0.99)
    solution = solver(problem.f, problem.x0.float(), threshold=300, eps=0.0)
    assert solution["lowest"] < 3e-6
