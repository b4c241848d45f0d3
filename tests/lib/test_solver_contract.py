"""What every solver promises, over dtypes, ranks and kinds of problem."""

import math
from functools import partial
from itertools import product

import pytest
import torch

from lib.errors import InputError
from lib.solvers import (
    SOLVERS,
    anderson,
    broyden,
    fixed_point_iteration,
    newton_krylov,
)
from parameters import slow_but
from problems import SHAPES, NanFrom, Problem, Recorder, contraction, rotation

ALL = {**SOLVERS, "broyden with line search": partial(broyden, ls=True)}
ACCELERATED = [name for name in ALL if name != "fixed_point_iteration"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Where a solve should arrive. A map whose values are rounded to the dtype cannot be solved below
# its rounding error (1.1e-16, 6e-8, 2e-3 relative) times 1 / (1 - radius): two or three digits
# above that.
EPS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

by_solver = pytest.mark.parametrize("solver", ALL.values(), ids=ALL)
by_rank = pytest.mark.parametrize("rank", SHAPES)
# Neither has to do with the other.
by_form = pytest.mark.parametrize(
    ("dtype", "rank"),
    slow_but(zip(DTYPES, SHAPES, strict=True), product(DTYPES, SHAPES)),
    ids=str,
)
by_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])


def solve(solver, problem: Problem, dtype, *, f=None, x0=None, **options) -> tuple[dict, Recorder]:
    """Solve in ``dtype`` and check everything that holds for any solve whatever."""
    recorder = Recorder(problem.f if f is None else f)
    x0 = (problem.x0 if x0 is None else x0).to(dtype)
    before = x0.clone()
    solution = solver(recorder, x0, **options)
    assert torch.equal(x0, before)
    check(solution, recorder, x0)
    return solution, recorder


def check(solution: dict, recorder: Recorder, x0) -> None:
    mode = solution["stop_mode"]
    trace = solution[f"{mode}_trace"]
    result = solution["result"]
    assert (result.shape, result.dtype) == (x0.shape, x0.dtype)
    assert torch.isfinite(result).all()
    assert not result.requires_grad
    assert solution["nfe"] == len(solution["abs_trace"]) == len(solution["rel_trace"])
    assert solution["nfe"] == len(recorder.points)
    assert all(type(value) is float and value >= 0 for value in trace)
    assert solution["nstep"] == trace.index(min(trace))
    assert solution["lowest"] == trace[solution["nstep"]]
    assert all(p.dtype == x0.dtype and p.shape == x0.shape for p in recorder.points)

    # Residuals of every sample at every point, recomputed in float64.
    points = torch.stack(recorder.points).flatten(2).double()  # (nfe, B, D)
    values = torch.stack(recorder.values).flatten(2).double()
    g, f = (values - points).norm(dim=2), values.norm(dim=2)  # (nfe, B)
    own = g if mode == "abs" else g / (f + 1e-30)
    finite_at = torch.isfinite(own)
    own = own.masked_fill(~finite_at, math.inf)
    assert torch.equal(solution["finite"], finite_at.all(0))

    # The result is the visited point of the lowest residual; a sample that f lost there holds
    # the best of the points where f was finite, or the start.
    step = solution["nstep"]
    flat = result.flatten(1).double()
    for sample in range(len(x0)):
        at = step if finite_at[step, sample] else int(own[:, sample].argmin())
        assert torch.equal(flat[sample], points[at, sample])
        # The solver works in float32 at least, so its norms are good to about 1e-6.
        assert solution["residual"][sample].item() == pytest.approx(
            own[at, sample].item(), rel=1e-5
        )
    residual = solution["residual"]
    assert torch.equal(solution["converged"], (residual < solution["eps"]) | (residual == 0))

    total_g = g[step][finite_at[step]].square().sum().sqrt().item()
    total_f = f[step][finite_at[step]].square().sum().sqrt().item()
    if finite_at[step].any():
        lowest = total_g if mode == "abs" else total_g / (total_f + 1e-30)
        assert solution["lowest"] == pytest.approx(lowest, rel=1e-5)
    else:
        assert solution["lowest"] == math.inf


@by_solver
@by_form
@by_mode
def test_contraction(solver, dtype, rank, stop_mode):
    problem = contraction(SHAPES[rank])
    eps = EPS[dtype]
    solution, _ = solve(solver, problem, dtype, threshold=60, eps=eps, stop_mode=stop_mode)
    # ||f|| is about 6 here, so that bfloat16 may stay above an absolute eps: its lowest residual
    # is then bounded by the rounding of f alone, a half unit in the last place of each number.
    scale = problem.solution.norm().item() if stop_mode == "abs" else 1.0
    assert solution["lowest"] < eps * max(scale, 1.0)
    if dtype != torch.bfloat16:
        assert solution["lowest"] < eps
        assert solution["converged"].any()  # stopping is by the batch: not every sample must be
    assert not solution["prot_break"]
    # ||z - z*|| <= ||g|| / (1 - 0.6) for spectral norm 0.6, and each g is below eps ||f||.
    error = (solution["result"].double() - problem.solution).norm()
    assert error < 2.5 * eps * max(scale, 1.0) * 1.1 * problem.solution.norm()


@by_form
@by_mode
@pytest.mark.parametrize("name", ACCELERATED)
def test_rotation_that_plain_iteration_cannot_solve(name, dtype, rank, stop_mode):
    problem = rotation(SHAPES[rank])
    eps = EPS[dtype]
    solution, _ = solve(ALL[name], problem, dtype, threshold=60, eps=eps, stop_mode=stop_mode)
    # Absolute: the states have norm 3 or so, and bfloat16 rounds f to 2e-3 of that.
    bound = 2 * problem.solution.norm().item() * eps if stop_mode == "abs" else eps
    assert solution["lowest"] < (bound if dtype == torch.bfloat16 else eps)
    assert not solution["prot_break"]


@by_form
@by_mode
def test_plain_iteration_reports_divergence(dtype, rank, stop_mode):
    problem = rotation(SHAPES[rank])
    solution, _ = solve(
        fixed_point_iteration, problem, dtype, threshold=60, eps=EPS[dtype], stop_mode=stop_mode
    )
    assert solution["prot_break"]
    assert solution["nfe"] < 60  # 1.5^35 is above a million
    assert not solution["converged"].any()


@by_solver
@by_form
@by_mode
@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_one_nan_sample(solver, dtype, rank, stop_mode, call):
    """NaN from an evaluation on: the other samples are solved, that one rests."""
    if solver is newton_krylov and call > 1:
        pytest.skip("it may have converged before")
    problem = contraction(SHAPES[rank])
    f = NanFrom(problem.f, sample=1, call=call)
    eps = EPS[dtype]
    solution, recorder = solve(
        solver, problem, dtype, f=f, threshold=60, eps=eps, stop_mode=stop_mode
    )
    assert solution["nfe"] > call
    assert solution["finite"].tolist() == [True, False, True]
    others = torch.tensor([0, 2])
    if dtype != torch.bfloat16:
        assert solution["lowest"] < eps
    error = (solution["result"].double() - problem.solution)[others].norm()
    scale = problem.solution.norm().item()
    assert error < 2.5 * eps * max(scale if stop_mode == "abs" else 1.0, 1.0) * 1.1 * scale
    assert not solution["converged"][1]
    assert not solution["prot_break"]
    if call == 0:
        assert torch.equal(solution["result"][1], problem.x0[1].to(dtype))
        assert solution["residual"][1] == math.inf
    for point in recorder.points:
        assert torch.isfinite(point).all()  # f never sees NaN that it made itself


@by_solver
@by_form
def test_every_sample_nan(solver, dtype, rank):
    x0 = torch.randn(SHAPES[rank], generator=torch.Generator().manual_seed(0)).to(dtype)
    solution, _ = solve(
        solver, Problem(lambda z: z * math.nan, x0), dtype, threshold=20, eps=EPS[dtype]
    )
    assert torch.equal(solution["result"], x0)
    assert solution["prot_break"]
    assert not solution["converged"].any()
    assert not solution["finite"].any()


@by_solver
@by_form
@by_mode
@pytest.mark.parametrize("start", ["zero", "random"])
def test_identity(solver, dtype, rank, stop_mode, start):
    x0 = torch.zeros(SHAPES[rank], dtype=dtype)
    if start == "random":
        x0 = torch.randn(SHAPES[rank], generator=torch.Generator().manual_seed(1)).to(dtype)
    problem = Problem(lambda z: z + 0, x0)
    solution, _ = solve(solver, problem, dtype, threshold=20, eps=0.0, stop_mode=stop_mode)
    assert torch.equal(solution["result"], x0)
    assert solution["converged"].all()
    assert (solution["lowest"], solution["nfe"], solution["nstep"]) == (0.0, 1, 0)
    assert not solution["prot_break"]


@by_solver
@by_form
def test_start_at_the_fixed_point(solver, dtype, rank):
    problem = rotation(SHAPES[rank])
    solution, _ = solve(solver, problem, dtype, x0=problem.solution, threshold=20, eps=EPS[dtype])
    assert torch.equal(solution["result"], problem.solution.to(dtype))
    assert (solution["nfe"], solution["nstep"]) == (1, 0)
    assert solution["converged"].all()
    assert not solution["prot_break"]


@by_solver
@by_rank
def test_goes_on_at_the_fixed_point(solver, rank):
    """With eps = 0 the iteration runs on at rounding level: nothing singular, nothing not finite.

    (It may end by a jump from there, which counts as divergence.)
    """
    problem = contraction(SHAPES[rank])
    solution, _ = solve(solver, problem, torch.float64, x0=problem.solution, threshold=30, eps=0.0)
    assert solution["lowest"] < 1e-15  # x0 itself is good to rounding
    assert solution["nfe"] > 1


@by_solver
@by_form
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_small_thresholds(solver, dtype, rank, threshold):
    solution, _ = solve(solver, contraction(SHAPES[rank]), dtype, threshold=threshold, eps=0.0)
    if solver in (anderson, fixed_point_iteration):
        assert solution["nfe"] == threshold
    elif solver is broyden:  # it counts updates
        assert solution["nfe"] == threshold + 1
    elif solver is newton_krylov:  # it counts products with J as well, and ends with an evaluation
        assert 1 <= solution["nfe"] + solution["products"] <= threshold
        assert solution["nfe"] == min(threshold, 2)  # the plain iteration that comes first
    else:  # a line search tries up to five lengths for each
        assert threshold + 1 <= solution["nfe"] <= 5 * threshold + 1
    assert solution["threshold"] == threshold
    assert not solution["converged"].any()
    assert not solution["prot_break"]


@by_solver
@pytest.mark.parametrize("call", [0, 1])
def test_nan_at_small_thresholds(solver, call):
    for threshold in (1, 2, 3):
        problem = contraction()
        f = NanFrom(problem.f, sample=0, call=call)
        solve(solver, problem, torch.float64, f=f, threshold=threshold, eps=0.0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stop_mode": "relative"}, "stop_mode"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 2.5}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"eps": -1e-3}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"check_every": 0}, "check_every"),
        ({"floor": -1.0}, "floor"),
        ({"x0": [0.0]}, "x0"),
        ({"x0": torch.zeros(2, 3, dtype=torch.long)}, "x0"),
        ({"x0": torch.zeros(())}, "x0"),
        ({"x0": torch.zeros(0, 3)}, "x0"),
        ({"x0": torch.full((2, 3), math.inf)}, "x0"),
        ({"f": 3}, "f"),
        pytest.param({"f": lambda z: z[:, :2]}, "f", id="f of another shape"),
        pytest.param({"f": lambda z: [z]}, "f", id="f that gives a list"),
    ],
    ids=str,
)
def test_misuse_is_named(name, options, named):
    arguments = {"f": torch.cos, "x0": torch.zeros(2, 3), "threshold": 5, **options}
    with pytest.raises(InputError, match=rf"\b{named}\b") as caught:
        SOLVERS[name](**arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", SOLVERS)
def test_unknown_keyword(name):
    with pytest.raises(TypeError, match="stopmode"):
        SOLVERS[name](torch.cos, torch.zeros(1, 2), threshold=5, stopmode="rel")


def test_name_is_handed_back():
    assert broyden(torch.cos, torch.zeros(1, 2), 5, name="forward")["name"] == "forward"
