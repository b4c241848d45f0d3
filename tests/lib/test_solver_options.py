"""Options of the solvers against dense references; budgets; what a good start saves."""

from importlib import import_module
from itertools import pairwise

import pytest
import torch

from dense_broyden import DenseBroyden, compare_with_dense
from lib.solvers import (
    ADJOINT_SOLVERS,
    SOLVERS,
    anderson,
    broyden,
    fixed_point_iteration,
)
from lib.solvers.broyden import BroydenInverse, LimitedInverse
from problems import Recorder, affine, rotation, symmetric, tanh_layer, visited, wall

# The functions of the same names hide the modules as attributes of lib.solvers.
broyden_py = import_module("lib.solvers.broyden")

EVERY = SOLVERS | ADJOINT_SOLVERS
by_name = pytest.mark.parametrize("name", EVERY)


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
    starts, search = [], broyden_py._line_search

    def spied(run, x, direction, start, step):
        starts.append((start, step, x.item()))
        return search(run, x, direction, start, step)

    monkeypatch.setattr(broyden_py, "_line_search", spied)
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
    taken, search = [], broyden_py._line_search

    def spied(run, x, direction, value, step):
        taken.append(value)
        return search(run, x, direction, value, step)

    monkeypatch.setattr(broyden_py, "_line_search", spied)
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
