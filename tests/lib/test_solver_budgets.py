"""Solvers' budgets, initial guesses and constants."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import lib.solvers.broyden
import lib.solvers.krylov
import lib.solvers.solve
from lib.solvers import (
    ADJOINT_SOLVERS,
    SOLVERS,
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    gmres,
)
from lib.solvers.anderson import _AndersonWindow
from lib.solvers.broyden import BroydenInverse
from lib.solvers.maps import Affine
from problems import (
    Recorder,
    contraction,
    problem_for,
    tanh_layer,
    visited,
    wall,
)

EVERY = SOLVERS | ADJOINT_SOLVERS
by_name = pytest.mark.parametrize("name", EVERY)


# --- Budgets ------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("stop", ["batch", "sample"])
def test_max_nfe(name, stop):
    """Never more; the best point so far is returned, that of the same solve without a budget."""
    problem, with_products = problem_for(name), name in ("newton_krylov", "gmres", "bicgstab")
    options = {"threshold": 60, "eps": 0.0, "stop": stop}
    long = EVERY[name](problem.f, problem.x0, **options)
    for max_nfe in range(1, 10):
        recorder = Recorder(problem.f)
        solution = EVERY[name](recorder, problem.x0, max_nfe=max_nfe, **options)
        spent = solution["nfe"] + solution["products"]
        assert spent <= max_nfe
        assert spent == max_nfe or with_products
        assert solution["reason"] == "max_nfe"
        assert not solution["prot_break"]
        assert solution["threshold"] == 60
        assert solution["lowest"] <= solution["rel_trace"][0]
        if not with_products:
            assert solution["rel_trace"] == long["rel_trace"][:max_nfe]
            best = recorder.points[solution["nstep"]]
            if stop == "batch":
                assert torch.equal(solution["result"], best)
                assert solution["lowest"] == min(solution["rel_trace"])


@by_name
def test_the_threshold_may_be_what_ends_it(name):
    problem = problem_for(name)
    solve = partial(EVERY[name], problem.f, problem.x0, eps=0.0)
    assert solve(threshold=5, max_nfe=100)["reason"] == "threshold"
    assert EVERY[name](problem.f, problem.x0, threshold=80, max_nfe=79)["reason"] == "eps"


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iteration"])
@pytest.mark.parametrize("check_every", [2, 3, 7, 50])
def test_max_nfe_between_checks(name, check_every):
    problem = tanh_layer()
    solve = partial(SOLVERS[name], problem.f, problem.x0, threshold=60, eps=0.0)
    for max_nfe in range(1, 12):
        often = solve(max_nfe=max_nfe)
        rarely = solve(max_nfe=max_nfe, check_every=check_every)
        assert rarely["nfe"] == max_nfe
        assert rarely["abs_trace"] == often["abs_trace"]
        assert torch.equal(rarely["result"], often["result"])
        assert rarely["reason"] == "max_nfe"


class Clock:
    """perf_counter that advances by a second whenever f is evaluated or a product made."""

    def __init__(self, f, monkeypatch):
        self.f, self.now = f, 100.0
        monkeypatch.setattr(lib.solvers.solve.time, "perf_counter", lambda: self.now)

    def __call__(self, z):
        self.now += 1.0
        return self.f(z)


@by_name
@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("seconds", [1e-9, 0.5, 1.0, 3.5, 6.0])
def test_max_seconds(name, stop, seconds, monkeypatch):
    """f is evaluated once at least; then nothing is begun after the time is over."""
    problem = problem_for(name)
    f = Clock(problem.f, monkeypatch)
    options = {"threshold": 60, "eps": 0.0, "stop": stop, "max_seconds": seconds}
    solution = EVERY[name](f, problem.x0, **options)
    assert solution["reason"] == "max_seconds"
    assert not solution["prot_break"]
    assert solution["nfe"] >= 1
    assert solution["lowest"] <= solution["rel_trace"][0]
    if name in ("gmres", "bicgstab"):
        # The point that products led to is evaluated; products of bicgstab come in pairs.
        assert f.now - 100 <= max(math.ceil(seconds), 1) + 1 + (name == "bicgstab")
    elif name != "newton_krylov":  # of which products do not call f
        assert solution["nfe"] == max(math.ceil(seconds), 1)


def test_time_does_not_run_after_the_end(monkeypatch):
    """A solve that was ended by something else says so, however late it is by then."""
    problem = tanh_layer()
    times = iter([0.0, 1.0, 2.0, 2.4, *[1e9] * 10])  # at the start, and after each evaluation
    monkeypatch.setattr(lib.solvers.solve.time, "perf_counter", lambda: next(times))
    options = {"threshold": 3, "eps": 0.0, "max_seconds": 2.5}
    solution = fixed_point_iteration(problem.f, problem.x0, **options)
    assert (solution["nfe"], solution["reason"]) == (3, "threshold")
    f = Clock(problem.f, monkeypatch)
    converged = anderson(f, problem.solution, eps=1e-6, max_seconds=0.5)
    assert (converged["nfe"], converged["reason"]) == (1, "eps")


def test_a_line_search_within_its_time(monkeypatch):
    f = Clock(wall, monkeypatch)
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    for seconds in (0.5, 1.5, 2.5, 3.5, 10.5):
        f.now = 100.0
        solution = broyden(f, x0, ls=True, threshold=20, eps=1e-12, max_seconds=seconds)
        assert solution["nfe"] <= math.ceil(seconds)
        assert torch.isfinite(solution["result"]).all()


@pytest.mark.parametrize("check_every", [3, 50])
def test_time_between_checks(check_every, monkeypatch):
    problem = tanh_layer()
    f = Clock(problem.f, monkeypatch)
    options = {"threshold": 60, "eps": 0.0, "check_every": check_every}
    solution = anderson(f, problem.x0, max_seconds=7.5, **options)
    assert solution["nfe"] == len(solution["abs_trace"]) == 8
    assert solution["reason"] == "max_seconds"


# --- A good initial guess -----------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_a_warm_start_saves_evaluations(name, stop, stop_mode):
    problem = problem_for(name)
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"threshold": 200, "eps": 1e-9, "stop": stop, "stop_mode": stop_mode}
    spent = []
    for distance in (None, 1e-2, 1e-5, 1e-12):
        x0 = problem.x0 if distance is None else problem.solution + distance * noise
        solution = EVERY[name](problem.f, x0, **options)
        assert solution["lowest"] < 1e-9 * (1 if stop == "batch" else 2)
        spent.append(solution["nfe"] + solution["products"])
    assert spent[0] > spent[1] > spent[2] > spent[3] == 1


@pytest.mark.parametrize("solver", [gmres, bicgstab])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_norm_of_the_start_is_not_that_of_the_solution(solver, size):
    """From a start of any size, one cycle does: it judges by the point it has reached."""
    problem = contraction()
    x0 = size * torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).double()
    solution = solver(problem.f, x0, threshold=60, eps=1e-6)
    assert solution["lowest"] < 1e-6
    assert solution["nfe"] == 2


@pytest.mark.parametrize("solver", [gmres, bicgstab])
def test_the_last_estimate_is_enough(solver):
    """A cycle that ends by eps is not followed by another for a rounding of the norm of f."""
    for eps in (0.3, 0.1, 1e-2, 1e-5):
        for seed in range(10):
            problem = contraction(seed=seed)
            product = Affine(
                lambda v, p=problem: p.f(v) - p.f(torch.zeros_like(v)), problem.f(problem.x0)
            )
            for stop in ("batch", "sample"):
                solution = solver(product, problem.x0, threshold=60, eps=eps, stop=stop)
                assert solution["reason"] == "eps"
                assert solution["nfe"] == 2


# --- Constants that hold something --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "ridge", "s"),
    [(torch.float32, 1.1920929e-6, 2.0**-10), (torch.float64, 1e-13, 2.0**-22)],
)
def test_the_default_ridge(dtype, ridge, s):
    """Residuals 1 and 1 + s: with s^2 near the ridge, the weights tell how large it is."""
    window = _AndersonWindow(torch.zeros(1, 1, dtype=dtype), m=2, lam=None, beta=1.0)
    for i, size in enumerate((1.0, 1.0 + s)):
        window.residual[i].fill_(size)
        window.renew_gram(i, i + 1, False)
    found = window._weights(1)[0, 0]
    # (G + ridge diag G) a = 1 up to a factor, by Cramer's rule.
    a, b, c = 1 + ridge, 1 + s, (1 + s) ** 2 * (1 + ridge)
    expected = torch.tensor([c - b, a - b], dtype=torch.float64) / (c - b + a - b)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_where_no_update_exists_the_step_is_plain():
    """The residual did not change along the last step: s' H y = 0."""
    g = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inverse = BroydenInverse(g, 5)
    inverse.residual.copy_(g)
    torch.testing.assert_close(inverse.newton_direction(None), g)
    inverse.residual.copy_(g)
    torch.testing.assert_close(inverse.newton_direction(1.0), g)


def test_a_point_that_runs_away_for_little_is_not_taken():
    """Up to a thousand times as far as before; beyond, its residual must have halved."""
    one = np.ones(1)
    for length, residual, taken in [
        (900.0, 0.8, True),
        (2000.0, 0.8, False),
        (2000.0, 0.51, False),
        (2000.0, 0.49, True),
        (1e8, 0.49, True),
    ]:
        best = lib.solvers.krylov._Best(one, one, torch.zeros(1, 1, dtype=torch.float64))
        offer = [np.array([v]) for v in (True, residual, length, 1.0)]
        assert best.offer(*offer).tolist() == [taken]


@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("restart", [False, True])
def test_anderson_damps_the_samples_that_were_led_far_out(stop, restart):
    """And them alone: of z - 1e4 z^3 the first step leads to 1e4 z0^3; tanh is as it is alone."""
    problem = tanh_layer((1, 12))

    def wild(z):
        return z + 2 - 1e5 * z**3

    def both(z):
        return torch.cat([problem.f(z[:1]), wild(z[1:])])

    options = {"threshold": 40, "restart": restart, "stop": stop, "eps": 0.0}
    x0 = torch.full((2, 12), 2.0, dtype=torch.float64)
    together = Recorder(lambda z: both(z) if len(z) == 2 else wild(z))
    solution = anderson(together, x0, **options)
    assert solution["abs_trace"][1] > 1e6 * solution["abs_trace"][0]
    for i, f in enumerate((problem.f, wild)):
        alone = visited(anderson, f, x0[i : i + 1], **options)
        n = min(12, len(alone))
        for a, b in zip(alone[:n], together.points[:n], strict=True):
            scale = 1 + a.abs().max()
            torch.testing.assert_close(a[0] / scale, b[i] / scale, rtol=0, atol=1e-9)
