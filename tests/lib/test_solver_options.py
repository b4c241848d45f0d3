"""Options of the solvers against dense references; budgets; what a good start saves."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import lib.broyden
import lib.krylov
import lib.solver_run
from dense_broyden import DenseBroyden, compare_with_dense
from lib.anderson import _AndersonWindow
from lib.broyden import BroydenInverse, LimitedInverse
from lib.maps import Affine
from lib.solvers import (
    ADJOINT_SOLVERS,
    SOLVERS,
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    gmres,
)
from problems import Recorder, affine, contraction, rotation, symmetric, tanh_layer, visited

EVERY = SOLVERS | ADJOINT_SOLVERS
by_name = pytest.mark.parametrize("name", EVERY)


def problem_for(name, **options):
    """A problem that the solver is for."""
    return contraction(**options) if name in ("gmres", "bicgstab") else tanh_layer(**options)


# --- Plain iteration ----------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1.0, 0.7, 0.1])
def test_damped_iteration(damping):
    problem = tanh_layer()
    found = visited(fixed_point_iteration, problem.f, problem.x0, damping=damping, threshold=9)
    z = problem.x0
    for point in found:
        torch.testing.assert_close(point, z, rtol=0, atol=1e-14)
        z = damping * problem.f(z) + (1 - damping) * z


def test_damping_converges_where_plain_iteration_does_not():
    """Eigenvalues in [-3, 0.5]: those of the damped map are in [-0.6, 0.8]."""
    values = torch.linspace(-3.0, 0.5, 12, dtype=torch.float64)
    problem = affine(torch.diag(values).repeat(3, 1, 1), (3, 12))
    options = {"threshold": 200, "eps": 1e-9}
    assert not fixed_point_iteration(problem.f, problem.x0, **options)["converged"].any()
    damped = fixed_point_iteration(problem.f, problem.x0, damping=0.4, **options)
    assert damped["lowest"] < 1e-9
    torch.testing.assert_close(damped["result"], problem.solution, rtol=0, atol=1e-7)


# --- Anderson -----------------------------------------------------------------------------------


def restarted_anderson(f, x0, m, beta, evaluations, ridge) -> torch.Tensor:
    """Points of Anderson's method that begins anew once m points are stored.

    (ridge + G G') a = 1 up to a factor, sample by sample; ridge: of G G' of one sample.
    """
    shape, batch = x0.shape, len(x0)
    points, xs, values = [x0.flatten(1)], [], []
    while len(points) < evaluations:
        if len(xs) == m:
            xs, values = [], []
        xs.append(points[-1])
        values.append(f(points[-1].view(shape)).flatten(1))
        if len(points) == 1:  # a plain step at first
            points.append(values[0])
            continue
        new = torch.empty_like(points[0])
        for b in range(batch):
            x, fx = (torch.stack([v[b] for v in stored]) for stored in (xs, values))
            gram = (fx - x) @ (fx - x).T
            gram = gram + ridge(gram)
            a = torch.linalg.solve(gram, torch.ones(len(xs), dtype=torch.float64))
            a = a / a.sum()
            new[b] = beta * a @ fx + (1 - beta) * a @ x
        points.append(new)
    return torch.stack(points)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("lam", [None, 1e-4])
def test_anderson_anew(m, beta, lam):
    """To 1e-7: weights are sensitive to rounding where residuals are nearly dependent."""
    problem = tanh_layer((3, 2, 6))
    options = {"m": m, "beta": beta, "lam": lam, "restart": True}
    found = visited(anderson, problem.f, problem.x0, threshold=12, **options)

    def ridge(gram):
        return 1e-13 * gram.diag().diag() if lam is None else lam * torch.eye(len(gram)).double()

    expected = restarted_anderson(problem.f, problem.x0, m, beta, 12, ridge)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_anderson_anew_before_it_is_full_is_anderson():
    problem = tanh_layer()
    options = {"m": 8, "threshold": 9}
    found = visited(anderson, problem.f, problem.x0, restart=True, **options)
    usual = visited(anderson, problem.f, problem.x0, **options)
    assert torch.equal(found, usual)


@pytest.mark.parametrize("restart", [False, True])
def test_the_relative_ridge_does_not_stall(restart):
    problem = symmetric((2, 30), radius=0.9)
    options = {"threshold": 100, "eps": 1e-10, "restart": restart}
    relative = anderson(problem.f, problem.x0, **options)
    assert relative["lowest"] < 1e-10
    absolute = anderson(problem.f, problem.x0, lam=1e-4, **options)
    # With weights swamped by the ridge, what is left is an average of plain steps.
    assert absolute["nfe"] == 100
    assert absolute["lowest"] > 1e3 * relative["lowest"]


# --- Broyden ------------------------------------------------------------------------------------


STEEP = {"tanh": tanh_layer((3, 12)), "steep tanh": tanh_layer((2, 3, 4), gain=3.0)}
SLOW = {"symmetric": symmetric((2, 30)), "rotation": rotation()}


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("problem", STEEP | {"symmetric": SLOW["symmetric"]})
def test_broyden_of_few_updates_is_the_dense_one(memory, damping, problem):
    problem = (STEEP | SLOW)[problem]
    compared = compare_with_dense(problem, memory=memory, damping=damping)
    assert compared >= (memory + 4) * len(problem.x0)


@pytest.mark.parametrize("damping", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("problem", STEEP | SLOW)
def test_damped_broyden_is_the_dense_one(damping, problem):
    problem = (STEEP | SLOW)[problem]
    assert compare_with_dense(problem, damping=damping) >= 4 * len(problem.x0)


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_memory_enough_for_all_updates_changes_nothing(damping, dtype):
    problem = tanh_layer()
    options = {"threshold": 10, "damping": damping}  # the last step is by nine updates
    full = visited(broyden, problem.f, problem.x0.to(dtype), **options)
    for memory in (9, 10, 1000):
        few = visited(broyden, problem.f, problem.x0.to(dtype), memory=memory, **options)
        # To rounding, which quasi-Newton steps amplify.
        tolerance = 1e-10 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(few, full, rtol=0, atol=tolerance)
    eight = visited(broyden, problem.f, problem.x0.to(dtype), memory=8, **options)
    torch.testing.assert_close(eight[:10], full[:10], rtol=0, atol=tolerance)
    if dtype == torch.float64:
        assert (eight[10] - full[10]).norm() > 1e-9


@pytest.mark.parametrize("memory", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [6, 30])
def test_few_updates_are_enough_for_contractions(memory, size):
    """Dropping the oldest rank-one terms of H as they stand diverges on every one of these."""
    weight = torch.linspace(-0.9, 0.9, size, dtype=torch.float64)
    x0 = torch.zeros(1, size, dtype=torch.float64)
    solution = broyden(lambda z: weight * z + 1, x0, threshold=100, eps=1e-8, memory=memory)
    assert solution["converged"].all()
    plain = fixed_point_iteration(lambda z: weight * z + 1, x0, threshold=300, eps=1e-8)
    assert solution["nfe"] < 0.6 * plain["nfe"]


@pytest.mark.parametrize("memory", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_broyden_does_not_depend_on_the_scale(memory, dtype):
    """Scaling z by a power of two scales every iterate, exactly."""
    problem, scale = tanh_layer(), 2.0**-40
    x0 = problem.x0.to(dtype)
    options = {"memory": memory, "threshold": 12}
    found = visited(broyden, problem.f, x0, **options)
    small = visited(broyden, lambda z: scale * problem.f(z / scale), x0, **options)
    torch.testing.assert_close(small / scale, found, rtol=0, atol=0)


@pytest.mark.parametrize("memory", [None, 2, 4, 50])
def test_a_solved_sample_does_not_spoil_the_updates(memory):
    """Its steps are zero: nothing to divide by, in H or in the batch."""
    matrices = torch.zeros(3, 12, 12, dtype=torch.float64)
    matrices[1:] = symmetric((2, 12), 0.8).jacobian
    problem = affine(matrices, (3, 12))
    x0 = problem.x0.clone()
    x0[0] = problem.solution[0]
    for dtype, eps in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        solution = broyden(problem.f, x0.to(dtype), threshold=60, eps=eps, memory=memory)
        assert solution["lowest"] < eps
        assert torch.isfinite(solution["result"]).all()
        torch.testing.assert_close(solution["result"][0], problem.solution[0].to(dtype))


@pytest.mark.parametrize("memory", [None, 1, 3, 50])
def test_identity_and_constant_steps(memory):
    """y = 0 along a step: no update can be made of it, and the plain step is taken."""
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    options = {"threshold": 10, "memory": memory, "stop_mode": "abs", "eps": 1e-9}
    points = visited(broyden, lambda z: z + 1, x0, **options)
    assert torch.isfinite(points).all()
    if memory is not None:
        expected = torch.arange(11, dtype=torch.float64)
        torch.testing.assert_close(points[:, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [None, 3, 5, 50])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_the_inverse_and_its_transpose(memory, damping):
    """keep_inverse hands back H after the last step; H' v as it was after fewer of the updates."""
    problem = tanh_layer()
    options = {"memory": memory, "damping": damping, "threshold": 7}
    recorder = Recorder(problem.f)
    solution = broyden(recorder, problem.x0, eps=0.0, keep_inverse=True, **options)
    inverse = solution["inverse"]
    assert isinstance(inverse, BroydenInverse if memory is None else LimitedInverse)
    points = torch.stack(recorder.points)
    residuals = torch.stack(recorder.values) - points
    vector = torch.randn(3, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for updates in range(9):
        found = inverse.transposed(vector, updates)
        for b in range(3):
            dense = DenseBroyden(12)
            first = max(7 - (memory or 100), 0)  # of those still held
            for k in range(first, min(updates, 7)):
                dense.update(points[k + 1, b] - points[k, b], residuals[k + 1, b] - residuals[k, b])
            torch.testing.assert_close(found[b], dense.h.T @ vector[b], rtol=1e-7, atol=1e-9)
    assert solution["updates"] == solution["nstep"] == 7
    assert "inverse" not in broyden(problem.f, problem.x0, **options)


@pytest.mark.parametrize("memory", [None, 3])
def test_an_inverse_without_updates(memory):
    """From the solution there is no step to learn from: H = -I."""
    problem = tanh_layer()
    solution = broyden(problem.f, problem.solution, eps=1e-6, memory=memory, keep_inverse=True)
    assert solution["nfe"] == 1
    vector = torch.randn(3, 12, dtype=torch.float64)
    for updates in (0, 1, 5):
        assert torch.equal(solution["inverse"].transposed(vector, updates), -vector)


# --- The line search ----------------------------------------------------------------------------


def wall(z):
    """Not finite beyond 1.5; a unit step from 0 goes to 4."""
    return torch.where(z < 1.5, z + 4 * (1 - z), math.nan)


@pytest.mark.parametrize("max_nfe", [1, 2, 3, 4, 5, 9])
def test_a_line_search_that_runs_out_of_its_budget(max_nfe):
    """Even before any of its trials was finite: the point before is returned."""
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    calls = Recorder(wall)
    options = {"ls": True, "threshold": 20, "eps": 1e-9, "max_nfe": max_nfe, "keep_inverse": True}
    solution = broyden(calls, x0, **options)
    assert solution["nfe"] == len(calls.points) <= max_nfe
    assert solution["finite"].all()
    assert torch.isfinite(solution["result"]).all()
    if max_nfe <= 2:
        assert torch.equal(solution["result"], x0)
        assert solution["reason"] == "max_nfe"
    vector = torch.ones(2, 3, dtype=torch.float64)
    assert torch.isfinite(solution["inverse"].transposed(vector, 5)).all()


def test_a_search_begins_from_the_value_of_its_point(monkeypatch):
    """Not from that of the last trial of the search before, which led nowhere."""
    sizes = iter([1.0, 2.5, 1.9, 2.6, 2.5, 2.4, 2.5, 2.6, 2.3, 0.1])  # of the residuals, in turn
    starts, search = [], lib.broyden._line_search

    def spied(run, x, direction, start, step):
        starts.append((start, step, x.item()))
        return search(run, x, direction, start, step)

    monkeypatch.setattr(lib.broyden, "_line_search", spied)
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    options = {"threshold": 3, "eps": 0.0, "ls": True, "keep_inverse": True}
    solution = broyden(lambda z: z + next(sizes), x0, stop_mode="abs", **options)
    # 1.9 is no more than twice 1.0; of five trials none is below 1.25 times 1.9, so that the third
    # search is from the same point.
    assert [start for start, _, _ in starts] == [1.0, 1.9, 1.9]
    assert [step for _, step, _ in starts] == [0, 1, 1]
    assert starts[1][2] == starts[2][2] != starts[0][2]
    assert solution["nfe"] == 9
    # Three updates, by evaluations number 2, 7 and 8 (0 is the start).
    assert (solution["nstep"], solution["updates"]) == (0, 0)


@pytest.mark.parametrize("memory", [None, 2, 3, 50])
def test_learning_without_going_there(memory):
    """After return_to H has the update of the step, and the direction is of the point before."""
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(2, 6, dtype=torch.float64)
    inverse = BroydenInverse(like, 30) if memory is None else LimitedInverse(like, memory)
    dense = [DenseBroyden(6, memory) for _ in range(2)]
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6**0.5 - torch.eye(6)

    def g(x):
        return torch.tanh(x) @ matrix.double() + 1

    x, length = like, None
    for k, returns in enumerate([False, True, False, True, True, False, True, False]):
        inverse.residual.copy_(g(x))
        found = inverse.newton_direction(length).clone()
        length = [1.0, 0.1, 1e-3][k % 3]
        for b in range(2):
            expected = dense[b].direction(g(x)[b])
            torch.testing.assert_close(found[b], expected, rtol=1e-7, atol=1e-9)
            there = x + length * found
            dense[b].update((there - x)[b], (g(there) - g(x))[b])
        while returns:
            inverse.residual.copy_(g(there))
            inverse.newton_direction(length)
            found = inverse.return_to(g(x), length).clone()
            expected = torch.stack([dense[b].direction(g(x)[b]) for b in range(2)])
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
            there, returns = x + length * found, False
            for b in range(2):
                dense[b].update((there - x)[b], (g(there) - g(x))[b])
        x = there


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_a_search_shortens_a_step_however_far_it_would_lead(stop_mode):
    """z^5 = 1 from 3: the first trial raises the residual by a factor of 3e9."""
    x0 = torch.full((1, 1), 3.0, dtype=torch.float64)
    recorder = Recorder(lambda z: z + 1 - z**5)
    solution = broyden(recorder, x0, ls=True, threshold=100, eps=1e-9, stop_mode=stop_mode)
    assert solution["abs_trace"][1] > 1e9 * solution["abs_trace"][0]
    assert solution["converged"].all()
    assert solution["result"].item() == pytest.approx(1.0, abs=1e-8)
    assert solution["nfe"] <= 20


def test_a_search_takes_no_step_that_rises_without_bound(monkeypatch):
    """Broyden's directions lead up as well as down. Of the points taken, none is far up."""
    taken, search = [], lib.broyden._line_search

    def spied(run, x, direction, value, step):
        taken.append(value)
        return search(run, x, direction, value, step)

    monkeypatch.setattr(lib.broyden, "_line_search", spied)
    generator = torch.Generator().manual_seed(3)
    for gain in (2.0, 5.0, 20.0):
        matrix = gain * torch.randn(20, 20, generator=generator, dtype=torch.float64)
        taken.clear()
        broyden(
            lambda z, a=matrix: z + 30 * torch.sin(z @ a) - 1,
            torch.ones(2, 20, dtype=torch.float64),
            threshold=100,
            eps=1e-9,
            ls=True,
        )
        assert len(taken) > 20
        assert max(taken) <= 3.7 * taken[0]
        assert any(b > a for a, b in pairwise(taken))


# --- Budgets ------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("max_nfe", range(1, 10))
def test_max_nfe(name, stop, max_nfe):
    """Never more; the best point so far is returned, that of the same solve without a budget."""
    problem = problem_for(name)
    recorder = Recorder(problem.f)
    options = {"eps": 0.0, "stop": stop}
    solution = EVERY[name](recorder, problem.x0, threshold=60, max_nfe=max_nfe, **options)
    spent = solution["nfe"] + solution["products"]
    assert spent <= max_nfe
    assert spent == max_nfe or name in ("newton_krylov", "gmres", "bicgstab")
    assert solution["reason"] == "max_nfe"
    assert not solution["prot_break"]
    assert solution["threshold"] == 60
    assert solution["lowest"] <= solution["rel_trace"][0]
    if name not in ("newton_krylov", "gmres", "bicgstab"):
        long = EVERY[name](problem.f, problem.x0, threshold=60, **options)
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
        monkeypatch.setattr(lib.solver_run.time, "perf_counter", lambda: self.now)

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
    monkeypatch.setattr(lib.solver_run.time, "perf_counter", lambda: next(times))
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
        best = lib.krylov._Best(one, one, torch.zeros(1, 1, dtype=torch.float64))
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
