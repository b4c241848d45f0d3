"""Solvers against independent dense references, and what they do when things go wrong."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_broyden import DenseBroyden, compare_with_dense
from lib.errors import InputError
from lib.solvers import SOLVERS, anderson, broyden, fixed_point_iteration
from problems import NanFrom, Problem, affine, contraction, cosine, symmetric, tanh_layer, visited

by_name = pytest.mark.parametrize("name", SOLVERS)
by_stop = pytest.mark.parametrize("stop", ["batch", "sample"])


# --- Anderson ---------------------------------------------------------------------------------


def anderson_reference(f, x0, m, lam, beta, evaluations) -> torch.Tensor:
    """MODELS.md: [[0, 1'], [1, G G' + lam I]] [nu; a] = [1; 0], sample by sample."""
    shape, batch = x0.shape, len(x0)
    points = [x0.flatten(1)]
    values = [f(x0).flatten(1)]
    points.append(values[0])
    values.append(f(points[1].view(shape)).flatten(1))
    for k in range(2, evaluations):
        n = min(m, k)
        new = torch.empty_like(points[0])
        for b in range(batch):
            x = torch.stack([p[b] for p in points[-n:]])
            fx = torch.stack([v[b] for v in values[-n:]])
            g = fx - x
            system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
            system[0, 1:] = system[1:, 0] = 1
            system[1:, 1:] = g @ g.T + lam * torch.eye(n, dtype=torch.float64)
            right = torch.zeros(n + 1, dtype=torch.float64)
            right[0] = 1
            a = torch.linalg.solve(system, right)[1:]
            new[b] = beta * a @ fx + (1 - beta) * a @ x
        points.append(new)
        values.append(f(new.view(shape)).flatten(1))
    return torch.stack(points)


@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("beta", [1.0, 0.7, 1.2])
def test_anderson_is_the_bordered_system(m, beta):
    """Both solve the same system of condition 1e5 at most: 1e-9 leaves room for rounding."""
    problem = tanh_layer((3, 2, 6))
    found = visited(anderson, problem.f, problem.x0, m=m, lam=1e-4, beta=beta, threshold=14)
    expected = anderson_reference(problem.f, problem.x0, m, 1e-4, beta, 14)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [2, 4, 6])
def test_anderson_minimises_the_mixed_residual(m):
    """Default ridge: the least-squares solution in residual differences, without any ridge.

    Compared while the residual falls from 1 to 1e-4: the relative ridge (1e-15) perturbs the
    weights by it times the condition of G G', far below 1e-6 here.
    """
    problem = tanh_layer((3, 12))
    found = visited(anderson, problem.f, problem.x0, m=m, threshold=8)
    values = torch.stack([problem.f(p) for p in found])
    for k in range(2, len(found)):
        window = slice(max(k - m, 0), k)
        for b in range(3):
            x, fx = found[window, b], values[window, b]
            g = fx - x
            gamma = torch.linalg.lstsq((g[1:] - g[0]).T, -g[0]).solution
            weights = torch.cat([1 - gamma.sum()[None], gamma])
            torch.testing.assert_close(found[k, b], weights @ fx, rtol=0, atol=1e-6)


def test_default_ridge_converges_where_the_absolute_one_stalls():
    problem = symmetric()
    options = {"threshold": 200, "eps": 1e-9}
    assert anderson(problem.f, problem.x0, **options)["lowest"] < 1e-9
    stalled = anderson(problem.f, problem.x0, lam=1e-4, **options)
    assert stalled["lowest"] > 1e-5
    assert stalled["nfe"] == 200


def test_default_ridge_does_not_depend_on_the_scale():
    """Scaling z by a power of two scales every iterate exactly."""
    problem = tanh_layer()
    scale = 2.0**-30
    found = visited(anderson, problem.f, problem.x0, threshold=15)
    small = visited(anderson, lambda z: scale * problem.f(z / scale), problem.x0, threshold=15)
    torch.testing.assert_close(small / scale, found, rtol=0, atol=0)


# --- Broyden ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [tanh_layer((3, 12)), tanh_layer((2, 3, 4), gain=3.0), symmetric((2, 30)), cosine()],
    ids=["tanh", "steep tanh", "symmetric", "cosine"],
)
def test_broyden_is_the_dense_update(problem):
    assert compare_with_dense(problem) >= 4 * len(problem.x0)


def arctan_problem(shape=(3, 6)) -> Problem:
    """g(z) = -20 arctan(A (z - c)): unit steps overshoot by far."""
    generator = torch.Generator().manual_seed(5)
    size = math.prod(shape[1:])
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = torch.eye(size, dtype=torch.float64) + 0.2 * noise / size**0.5
    centre = torch.randn(shape, generator=generator, dtype=torch.float64)

    def f(z):
        return z - 20 * torch.atan((z - centre).flatten(1) @ matrix.T).view(z.shape)

    return Problem(f, centre + 10.0, centre)


def steep_tanh() -> Problem:
    problem = tanh_layer((2, 12), gain=8.0)
    return Problem(problem.f, problem.x0 + 3)


def test_line_search_solves_what_unit_steps_do_not():
    problem = arctan_problem()
    options = {"threshold": 40, "eps": 1e-9, "stop_mode": "abs"}
    unit = broyden(problem.f, problem.x0, **options)
    searched = broyden(problem.f, problem.x0, ls=True, **options)
    # Not by the residual: where |z| is above 1e17 it is lost to rounding, and looks like zero.
    assert (unit["result"] - problem.solution).norm() > 1
    assert searched["converged"].all()
    # ||z - c|| <= ||g|| / 20 times the norm of A's inverse, about 1.5.
    torch.testing.assert_close(searched["result"], problem.solution, rtol=0, atol=1e-9)


@pytest.mark.parametrize("problem", [arctan_problem(), steep_tanh()], ids=["arctan", "steep tanh"])
def test_broyden_with_step_lengths_is_the_dense_update(problem):
    """Every trial lies on the ray of the dense direction, with one length for the whole batch;
    the search ends at a length that fits. After five that do not, there is an update by the
    shortest, and the next direction is from the same point."""
    points = visited(broyden, problem.f, problem.x0, threshold=12, ls=True)
    shape = problem.x0.shape
    residuals = torch.stack([problem.f(p.view(shape)).flatten(1) - p for p in points])
    values = residuals.square().sum((1, 2)).sqrt()
    dense = [DenseBroyden(points.shape[2]) for _ in range(shape[0])]
    here, trial, steps, lengths = 0, 1, 0, []
    while trial < len(points):
        rays = torch.stack([d.direction(g) for d, g in zip(dense, residuals[here], strict=True)])
        if rays.norm() < 1e-6:
            break
        tried = []
        while True:
            step = points[trial] - points[here]
            length = (step * rays).sum() / rays.square().sum()
            assert (step - length * rays).norm() <= 1e-6 * rays.norm() * length
            tried.append((trial, length.item()))
            trial += 1
            most = 1 + 1 / (steps + 1) ** 2 - 1e-4 * length.item() ** 2
            fits = values[trial - 1] <= most * values[here]
            if fits or len(tried) == 5:
                break
        assert [t[1] for t in tried] == pytest.approx(10.0 ** -torch.arange(len(tried)), rel=1e-6)
        there, length = tried[-1]
        lengths.append(length)
        for b, d in enumerate(dense):
            d.update(points[there, b] - points[here, b], residuals[there, b] - residuals[here, b])
        if fits:
            here, steps = there, steps + 1
    assert len(lengths) >= 4
    assert sum(length < 0.99 for length in lengths) >= 2  # or the test would show nothing


def test_line_search_steps_back_from_nan():
    """f is not finite beyond a wall: a shorter step is taken and no sample is lost."""

    def f(z):
        return torch.where(z < 1.5, z + 4 * (1 - z), math.nan)  # from 0 to 4 with a unit step

    x0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = broyden(f, x0, threshold=20, eps=1e-9, ls=True)
    assert solution["finite"].all()
    torch.testing.assert_close(solution["result"], torch.ones_like(x0), rtol=0, atol=1e-8)
    assert not broyden(f, x0, threshold=20, eps=1e-9)["finite"].any()


# --- All of them ------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize(
    "problem",
    [contraction(), tanh_layer(), tanh_layer((2, 2, 3, 2)), cosine()],
    ids=["contraction", "tanh", "tanh of rank 4", "cosine"],
)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_known_solutions(name, problem, stop_mode):
    solution = SOLVERS[name](problem.f, problem.x0, threshold=300, eps=1e-11, stop_mode=stop_mode)
    assert solution["lowest"] < 1e-11
    # The inverse of I - J is below 10 and the norms below 10 on all of these.
    torch.testing.assert_close(solution["result"], problem.solution, rtol=0, atol=1e-9)


@by_name
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_divergence_protection(name, stop_mode):
    """The residual grows tenfold at every evaluation, wherever the solver goes.

    The relative residual of it stays near 1, so this must be seen in the absolute one.
    """
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return z + 10.0**calls

    x0 = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = SOLVERS[name](f, x0, threshold=40, stop_mode=stop_mode)
    assert solution["prot_break"]
    assert solution["reason"] == "diverged"
    # A million times the first one is passed by evaluation 8; it goes on rising until the 12th.
    assert solution["nfe"] == 12
    assert not solution["converged"].any()
    if stop_mode == "abs":
        assert torch.equal(solution["result"], x0)


def test_rounding_errors_are_no_divergence():
    """From the solution the first residual is one rounding error; growth of that says nothing."""
    problem = contraction()
    assert not broyden(problem.f, problem.solution, threshold=30, eps=0.0)["prot_break"]


@by_name
@by_stop
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_growth_from_rounding_errors_is_no_divergence(name, stop, dtype):
    """A warm start as good as can be: its residual, 1e-9 of a rounding error, grows to one.

    In the model it is the noise of f. Growth by 1e9 is far more than a cold start may have.
    """
    unit, calls = torch.finfo(dtype).eps, 0

    def f(z):
        nonlocal calls
        calls += 1
        return z + unit * 10.0 ** min(calls - 10, 0)

    x0 = torch.zeros(2, 5, dtype=dtype)
    x0[:, 0] = 1.0  # ||f|| = 1
    options = {"eps": 0.0, "stop": stop}
    solution = SOLVERS[name](lambda z: f(z) - 0 * z, x0, threshold=30, **options)
    assert max(solution["abs_trace"]) > 1e6 * solution["abs_trace"][0]
    assert not solution["prot_break"]


@by_name
@by_stop
def test_nothing_is_lost_to_underflow(name, stop):
    """0 is the solution of z -> 3 z, which no relative residual knows: it goes on to the end."""
    if name == "fixed_point_iteration":
        return  # it diverges
    for dtype in (torch.float32, torch.float64):
        x0 = torch.ones(2, 5, dtype=dtype)
        solution = SOLVERS[name](lambda z: 3 * z, x0, threshold=100, eps=1e-4, stop=stop)
        assert solution["all_finite"]
        assert not solution["prot_break"]
        # Not of the result: all points have the relative residual 2/3 but for rounding, which is
        # another on other processors, so any of them may be the best.
        assert min(solution["abs_trace"]) < 1e-30


@by_stop
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("factor", [3.0, -3.0, 1.5, 1e3])
def test_plain_divergence_is_found_early(stop, stop_mode, factor):
    """z -> a z, whose relative residual stays near |a - 1| / |a|, in float32 as well."""
    options = {"threshold": 100, "stop_mode": stop_mode, "stop": stop}
    for dtype in (torch.float32, torch.float64):
        x0 = torch.ones(2, 5, dtype=dtype)
        solution = fixed_point_iteration(lambda z: factor * z, x0, **options)
        assert solution["prot_break"]
        assert solution["reason"] == "diverged"
        steps = math.log(1e6) / math.log(abs(factor))
        assert solution["nfe"] <= steps + 7
        assert not solution["converged"].any()


@by_stop
def test_an_end_far_out_is_told_whatever_ends_the_solve(stop):
    """After 15 evaluations of z -> 3 z the residual is 3^14 times the first one."""
    solve = partial(fixed_point_iteration, lambda z: 3 * z, torch.ones(2, 5).double(), stop=stop)
    assert [solve(threshold=n)["prot_break"] for n in (12, 13, 14, 15, 16)] == [False] * 2 + [
        True
    ] * 3
    assert solve(threshold=15)["reason"] == "threshold"


@by_stop
@by_name
@pytest.mark.parametrize("far", [1e7, 1e12, 1e30])
def test_a_single_large_step_ends_nothing(name, stop, far):
    """The second residual is that much larger; then all is as usual."""
    problem, calls = tanh_layer(), 0

    def f(z):
        nonlocal calls
        calls += 1
        return far * problem.f(z) if calls == 2 else problem.f(z)

    # Broyden's method goes on by what the wrong value taught it, Anderson's with a small beta.
    slow = name in ("broyden", "anderson")
    threshold = 60 if slow else 200
    solution = SOLVERS[name](f, problem.x0, threshold=threshold, eps=1e-9, stop=stop)
    assert solution["abs_trace"][1] > 1e6 * solution["abs_trace"][0]
    assert solution["reason"] in (("eps", "threshold") if slow else ("eps",))
    assert not solution["prot_break"]


@by_name
@pytest.mark.parametrize("mate", ["another scale", "diverging"])
def test_algebra_is_per_sample(name, mate):
    """The points a sample visits do not depend on its batch mates (stopping does)."""
    problem = tanh_layer((1, 12))
    other = tanh_layer((1, 12), seed=9)

    def both(z):
        second = 1e3 * other.f(z[1:]) if mate == "another scale" else 1.2 * z[1:] + 1
        return torch.cat([problem.f(z[:1]), second])

    newton = name == "newton_krylov"  # its threshold counts the products with J as well
    threshold = 80 if newton else 12
    alone = visited(SOLVERS[name], problem.f, problem.x0, threshold=threshold)
    x0 = torch.zeros(2, 12, dtype=torch.float64)
    together = visited(SOLVERS[name], both, x0, threshold=threshold)
    n = min(len(alone), len(together))
    assert n >= (4 if newton else 6)
    # Equal but for the order of summation in batched products.
    torch.testing.assert_close(together[:n, :1], alone[:n], rtol=0, atol=1e-10)


@by_name
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_nan_sample_does_not_disturb_its_mates(name, stop_mode):
    """With NaN there from the start, the rest of the batch is solved as if it were alone."""
    problem = tanh_layer((3, 12))
    keep = torch.tensor([0, 2])

    def without(z):
        full = torch.zeros(3, 12, dtype=z.dtype)
        full[keep] = z
        return problem.f(full)[keep]

    options = {"threshold": 60, "eps": 1e-10, "stop_mode": stop_mode}
    alone = SOLVERS[name](without, problem.x0[keep], **options)
    found = SOLVERS[name](NanFrom(problem.f, sample=1, call=0), problem.x0, **options)
    # Not to the last bit: batched products may sum in another order.
    torch.testing.assert_close(found["result"][keep], alone["result"], rtol=0, atol=1e-12)
    assert (found["nstep"], found["nfe"]) == (alone["nstep"], alone["nfe"])
    # Traces by their size relative to the first residual, for the same reason.
    difference = torch.tensor(found["abs_trace"]) - torch.tensor(alone["abs_trace"])
    assert difference.abs().max() < 1e-10
    assert torch.equal(found["converged"][keep], alone["converged"])


@by_name
def test_inf_is_not_finite_either(name):
    x0 = torch.zeros(2, 2, dtype=torch.float64)
    f = torch.tensor([[0.5, 0.5], [math.inf, 0.5]])
    solution = SOLVERS[name](lambda z: f.double(), x0, threshold=10)
    assert solution["finite"].tolist() == [True, False]
    assert solution["result"].tolist() == [[0.5, 0.5], [0.0, 0.0]]


@by_name
def test_no_graph_is_kept(name):
    weight = torch.tensor(0.5, requires_grad=True)
    x0 = torch.zeros(1, 3, requires_grad=True)
    graphs = []

    def f(z):
        value = torch.tanh(weight * z + 1)
        graphs.append(value.requires_grad)
        return value

    assert not SOLVERS[name](f, x0, threshold=5)["result"].requires_grad
    assert any(graphs) == (name == "newton_krylov")  # which differentiates f


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    size=st.integers(1, 12),
    radius=st.floats(0.0, 0.9),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    stop_mode=st.sampled_from(["abs", "rel"]),
)
def test_random_contractions(seed, batch, size, radius, scale, stop_mode):
    problem = contraction((batch, size), radius, seed)

    def f(z):
        return scale * problem.f(z / scale)

    expected = scale * problem.solution
    eps = 1e-9 * (expected.norm().item() if stop_mode == "abs" else 1.0)
    for solver in SOLVERS.values():
        solution = solver(f, problem.x0, threshold=300, eps=eps, stop_mode=stop_mode)
        assert solution["lowest"] < eps
        assert not solution["prot_break"]
        # ||z - z*|| <= ||g|| / (1 - radius); ||g|| is below eps ||f||, and ||f|| near ||z*||.
        bound = 1.01 * 1e-9 * expected.norm() / (1 - radius)
        assert (solution["result"] - expected).norm() <= bound


def test_one_bad_matrix_does_not_stop_the_others():
    """A sample whose residuals become exactly dependent falls back to its newest point."""
    matrices = torch.zeros(2, 4, 4, dtype=torch.float64)
    matrices[1] = 0.9 * torch.eye(4, dtype=torch.float64)
    problem = affine(matrices, (2, 4))  # sample 0 is solved by its first step
    for solver in (anderson, broyden):
        solution = solver(problem.f, problem.x0, threshold=30, eps=1e-12)
        torch.testing.assert_close(solution["result"], problem.solution, rtol=0, atol=1e-9)


def test_shape_changing_f_is_refused_at_any_evaluation():
    sizes = iter([3, 3, 2])
    with pytest.raises(InputError, match=r"\(1, 2\)"):
        fixed_point_iteration(lambda z: torch.rand(1, next(sizes)), torch.zeros(1, 3))
