"""The adjoint is judged by its own equation: small losses, exploding solves, samples alone."""

import warnings
from functools import partial

import bench_adjoints
import pytest
import torch

from lib.deq import DEQ
from lib.gradients.adjoint import POOR, LinearSolve
from lib.solvers import ADJOINT_SOLVERS, SOLVERS

by_solver = pytest.mark.parametrize("solver", ADJOINT_SOLVERS)
by_mode = pytest.mark.parametrize("mode", ["rel", "abs"])


def solve(matrix, b, solver="gmres", mode="rel", threshold=40, **options):
    """y = A y + b with A = ``matrix`` (D, D) for all samples; the solver's dict; the warnings."""
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = partial(ADJOINT_SOLVERS[solver], **options) if isinstance(solver, str) else solver
        y = LinearSolve(method, threshold, mode, seen.append)(lambda v: v @ matrix.T, b)
    return y, seen[0], [str(w.message) for w in caught]


def contraction(size: int = 6, dtype=torch.float64) -> torch.Tensor:
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (0.6 * w / torch.linalg.matrix_norm(w, 2)).to(dtype)


def exact(matrix, b):
    return torch.linalg.solve(torch.eye(len(matrix), dtype=b.dtype) - matrix, b.T).T


@by_mode
@by_solver
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-25, 1e-37, 1e15, 1e25])
def test_the_size_of_the_loss_does_not_matter(solver, mode, size):
    """In float32, whose squares vanish below 1e-19 and overflow above 1e19."""
    matrix = contraction(dtype=torch.float32)
    b = torch.ones(3, 6)
    y, solution, said = solve(matrix, size * b, solver, mode)
    torch.testing.assert_close(y / size, exact(matrix, b), rtol=5e-3, atol=2e-3)
    assert not said
    assert solution["converged"].all()
    residual = (size * b + y @ matrix.T - y).norm(dtype=torch.float64).item()
    assert solution["abs_lowest"] == pytest.approx(residual, rel=0.05, abs=3e-7 * size)


@by_mode
@by_solver
def test_a_small_sample_among_large_ones(solver, mode):
    """Either right to a tenth, or warned of: never a silent zero."""
    matrix, sizes = contraction(), torch.tensor([[1.0], [1e-12], [0.0]], dtype=torch.float64)
    b = sizes * torch.ones(3, 6, dtype=torch.float64)
    y, _, said = solve(matrix, b, solver, mode)
    assert torch.equal(y[2], torch.zeros(6, dtype=torch.float64))
    error = (y[1] - exact(matrix, b)[1]).norm() / exact(matrix, b)[1].norm()
    assert error < 0.1 or said
    assert y[1].norm() > 0


@by_mode
@by_solver
@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-30])
def test_a_small_sample_that_stops_by_itself_is_solved_like_the_others(solver, mode, size):
    matrix, sizes = contraction(), torch.tensor([[1.0], [size], [0.0]], dtype=torch.float64)
    b = sizes * torch.ones(3, 6, dtype=torch.float64)
    y, solution, said = solve(matrix, b, solver, mode, stop="sample", eps=1e-6)
    error = (y - exact(matrix, b)).norm(dim=1) / exact(matrix, b).norm(dim=1)
    assert error[:2].max() < 1e-5
    assert not said
    assert solution["converged"].all()
    residual = (b + y @ matrix.T - y).norm(dim=1)
    found = torch.from_numpy(solution["norms"][0])
    torch.testing.assert_close(found, residual, rtol=1e-3, atol=1e-15 * size)
    assert solution["abs_lowest"] == pytest.approx(residual.norm().item(), rel=1e-3)
    size_of_f = 1 if mode == "abs" else torch.from_numpy(solution["norms"][1])
    torch.testing.assert_close(solution["residual"] * size_of_f, found)


@by_mode
@pytest.mark.parametrize("solver", ["fixed_point_iteration", "anderson", "broyden"])
def test_an_exploding_solution_is_not_used(solver, mode):
    """diag(1.5, 0.2): plain iteration leaves a y of 1e6 whose residual is a third of ||f(y)||."""
    matrix = torch.diag(torch.tensor([1.5, 0.2], dtype=torch.float64))
    b = torch.ones(1, 2, dtype=torch.float64)
    threshold = {"fixed_point_iteration": 40, "anderson": 2, "broyden": 1}[solver]
    y, solution, said = solve(matrix, b, solver, mode, threshold)
    assert torch.equal(y, b)  # its residual, 1.5, is the least there is beside y = 0
    (message,) = said
    assert "adjoint is not solved" in message
    assert "up to 1" in message
    assert solution["nfe"] <= threshold + 1  # what the solver did is reported as it was


def test_what_is_better_than_one_step_is_used():
    matrix = 0.9 * torch.eye(2, dtype=torch.float64)
    b = torch.ones(1, 2, dtype=torch.float64)
    y, _, said = solve(matrix, b, "fixed_point_iteration", threshold=6)
    assert y[0, 0].item() == pytest.approx(sum(0.9**i for i in range(5)))
    assert len(said) == 1  # the residual is 0.9^5 = 0.59


def test_samples_are_judged_one_by_one():
    """A sample that explodes takes y = g; the others keep their own y."""
    scale = torch.tensor([[0.5], [1.9]], dtype=torch.float64)
    b = torch.ones(2, 3, dtype=torch.float64)
    solver = partial(ADJOINT_SOLVERS["fixed_point_iteration"], stop="sample", eps=1e-8)
    with pytest.warns(RuntimeWarning, match="not solved"):
        y = LinearSolve(solver, 40, "rel", lambda _: None)(lambda v: scale * v, b)
    torch.testing.assert_close(y[0], torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(y[1], b[1])


def test_a_solver_that_tells_nothing_is_judged_too():
    matrix, b = contraction(), torch.ones(2, 6, dtype=torch.float64)
    for factor, words in ((1.0, 0), (30.0, 1)):
        y, _, said = solve(
            matrix, b, lambda f, x0, factor=factor, **_: {"result": factor * exact(matrix, b)}
        )
        assert len(said) == words
        assert torch.equal(y, b if words else exact(matrix, b))


@by_mode
def test_no_gradient_is_a_silent_zero(mode):
    """The published 'abs' took y = 0 for solved as soon as ||g|| < eps."""
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    for name in set(SOLVERS) & set(ADJOINT_SOLVERS):
        deq = DEQ("broyden:eps=1e-8", name, b_stop_mode=mode)
        for size in (1e-2, 1e-6, 1e-12):
            z = deq(lambda z: 0.5 * z + x, torch.zeros(1, 3, dtype=torch.float64)).z
            (found,) = torch.autograd.grad(size * z.sum(), x)
            torch.testing.assert_close(found / size, torch.full_like(x, 2.0), rtol=2e-3, atol=0)


def test_a_good_adjoint_costs_no_product_more():
    calls = []

    def product(v):
        calls.append(0)
        return 0.5 * v

    b = torch.ones(2, 3)
    seen = []
    LinearSolve(ADJOINT_SOLVERS["anderson"], 30, "rel", seen.append)(product, b)
    assert len(calls) == seen[0]["nfe"] - 1  # the image of y = 0 is known


def test_count_over_random_systems():
    """A part of scripts/benchmarks/bench_adjoints.py: off by more than 100 % is said."""
    for radius in (0.9, 1.6, 3.0):
        for solver in ADJOINT_SOLVERS:
            for mode in ("rel", "abs"):
                found = bench_adjoints.count(radius, solver, mode, systems=4, size=30, steps=20)
                assert found.silent == 0
                assert found.worst < 5
    assert POOR <= 0.14
