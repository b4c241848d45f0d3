"""Newton's method: how fast, by which products, at what cost, and what it survives."""

import gc
import weakref
from functools import partial
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from lib.solvers import newton_krylov
from problems import SHAPES, Recorder, batched_tanh, tanh_layer

by_jvp = pytest.mark.parametrize("jvp", ["reverse", "forward"])
by_stop = pytest.mark.parametrize("stop", ["batch", "sample"])
# Without the plain iteration that comes first by default.
newton = partial(newton_krylov, warmup=0)
ENTIRE = {"inner": 12, "inner_eps": 1e-12}  # systems solved to rounding: Newton's method proper


def dense_newton(a, b, x, steps, damping=1.0):
    """The iterates of Newton's method on tanh(A z) + b - z = 0, solved densely."""
    points = [x]
    for _ in range(steps):
        y = torch.tanh(torch.bmm(a, x[:, :, None])[:, :, 0])
        jacobian = (1 - y**2)[:, :, None] * a
        g = y + b - x
        eye = torch.eye(x.shape[1], dtype=torch.float64)
        x = x + damping * torch.linalg.solve(eye - jacobian, g)
        points.append(x)
    return torch.stack(points)


# --- Against dense steps ------------------------------------------------------------------------


@by_jvp
@by_stop
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_iterates_are_those_of_dense_steps(jvp, stop, damping):
    f, a, b = batched_tanh()
    x0 = torch.zeros(3, 12, dtype=torch.float64)
    recorder = Recorder(f)
    options = {"threshold": 80, "eps": 0.0, "jvp": jvp, "stop": stop, "damping": damping}
    solution = newton(recorder, x0, **options, **ENTIRE)
    # Forward products are evaluations too, at the iterates.
    points, visited = recorder.points, []
    for point in points:
        if not visited or not torch.equal(point, visited[-1]):
            visited.append(point)
    expected = dense_newton(a, b, x0, 4, damping)
    torch.testing.assert_close(torch.stack(visited[:5]), expected, rtol=0, atol=1e-9)
    assert solution["nfe"] >= 5


@by_jvp
@pytest.mark.parametrize("rank", SHAPES)
def test_quadratic_convergence(jvp, rank):
    """||g|| is squared by each step, up to a factor, until rounding."""
    f, _, _ = batched_tanh(gain=1.5)
    x0 = torch.zeros(SHAPES[rank], dtype=torch.float64)
    solution = newton(f, x0, threshold=120, eps=1e-13, jvp=jvp, **ENTIRE)
    trace = solution["abs_trace"]
    assert solution["converged"].all()
    assert solution["nfe"] <= 12
    assert sum(1e-13 < a < 0.1 for a in trace) >= 3
    for before, after in pairwise(trace):
        if before < 0.1:
            assert after <= max(3 * before**2, 1e-13)


def test_inner_tolerance_is_the_rate():
    """Relative to the residual that the step begins from, however long the step is."""
    f, _, _ = batched_tanh(gain=2.0, batch=1)
    x0 = torch.zeros(1, 12, dtype=torch.float64)
    for inner_eps in (0.5, 0.1, 1e-3):
        options = {"inner": 20, "inner_eps": inner_eps}
        solution = newton(f, x0, threshold=300, eps=1e-10, **options)
        trace = solution["abs_trace"]
        near = [(a, b) for a, b in pairwise(trace) if 1e-10 < a < 1e-3]
        # The system's residual, and the curvature beyond it.
        assert near
        assert all(b <= inner_eps * a + 20 * a**2 + 1e-13 for a, b in near)


def test_long_steps_are_solved_for_as_well():
    """Where (I - J)^-1 is large, ||g|| is small beside the step: that is no reason to stop."""
    size = 40
    values = torch.linspace(0.0, 0.999, size, dtype=torch.float64)

    def f(z):
        return values * z + 1  # affine, so that one exact step would do

    x0 = torch.zeros(1, size, dtype=torch.float64)
    solution = newton(f, x0, threshold=60, eps=1e-12, inner=40, inner_eps=1e-3)
    assert solution["abs_trace"][1] <= 1.01e-3 * solution["abs_trace"][0]


@by_jvp
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_of_both_kinds_are_equal(jvp, dtype):
    """Both are J v to rounding, so the solves take the same course."""
    f, _, _ = batched_tanh(gain=0.9)
    x0 = torch.zeros(3, 12, dtype=dtype)
    eps = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    solve = partial(newton, f, x0, threshold=60, eps=eps)
    ours, reverse = solve(jvp=jvp), solve(jvp="reverse")
    assert ours["converged"].any()
    assert ours["lowest"] < eps
    assert (ours["nfe"], ours["products"]) == (reverse["nfe"], reverse["products"])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours["result"], reverse["result"], rtol=0, atol=tolerance)


@by_jvp
def test_maps_of_all_kinds(jvp):
    """Differentiable to any extent: no dependence on z, on part of it, steps, the identity."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    constant = torch.ones(2, 3, dtype=torch.float64)
    half = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    for f, expected in [
        (lambda z: constant, constant),
        (lambda z: weight * constant, 0.5 * constant),
        (lambda z: z.detach() * 0 + constant, constant),
        (lambda z: 0.5 * torch.sign(z) + constant, 1.5 * constant),
        (lambda z: torch.round(z) * 0 + constant, constant),
        (lambda z: 0.5 * half * z + constant, constant / (1 - 0.5 * half)),
        (lambda z: 2 * z + constant, -constant),
        (lambda z: torch.relu(z) * 0.25 + weight * constant, constant * 2 / 3),
    ]:
        solution = newton(f, x0, threshold=20, eps=1e-10, jvp=jvp)
        assert solution["converged"].all()
        torch.testing.assert_close(solution["result"], expected, rtol=0, atol=1e-9)
        assert not solution["result"].requires_grad
    assert weight.grad is None
    # Its derivatives, too, are of float32.
    solution = newton(lambda z: 2 * z.float().double() + 1, x0, eps=1e-6, jvp=jvp)
    torch.testing.assert_close(solution["result"], -constant, rtol=0, atol=1e-6)


@by_jvp
@by_stop
def test_eigenvalue_one(jvp, stop):
    """I - J = 0 has no Newton step: a plain one is taken, and the residual told."""
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = newton(lambda z: z + 1, x0, threshold=20, jvp=jvp, stop=stop, stop_mode="abs")
    assert not solution["converged"].any()
    assert solution["residual"].tolist() == pytest.approx([3**0.5] * 2)
    assert torch.isfinite(solution["result"]).all()

    def bent(z):  # has that eigenvalue at the start, and none at the solution
        return torch.where(z > 0, z - 1, 0.5 * z - 1)

    solution = newton(bent, x0 + 3.5, threshold=40, eps=1e-9, jvp=jvp, stop=stop, stop_mode="abs")
    assert solution["converged"].all()
    torch.testing.assert_close(solution["result"], x0 - 2, rtol=0, atol=1e-8)


def test_plain_is_used():
    """f.plain is what is differentiated and evaluated; f itself may have no derivatives."""
    problem = tanh_layer()
    calls = []

    def f(z):
        raise AssertionError("not f itself")

    def plain(z):
        calls.append(z)
        return problem.f(z)

    f.plain = plain
    solution = newton(f, problem.x0, threshold=60, eps=1e-10)
    torch.testing.assert_close(solution["result"], problem.solution, rtol=0, atol=1e-8)
    assert len(calls) == solution["nfe"]


# --- Costs --------------------------------------------------------------------------------------


@by_jvp
@by_stop
@pytest.mark.parametrize("inner", [1, 3, 20])
def test_counts(jvp, stop, inner):
    """nfe and products are what they say, and within the threshold or the budget."""
    f, _, _ = batched_tanh()
    x0 = torch.zeros(3, 12, dtype=torch.float64)
    for threshold in (1, 2, 3, 4, 5, 7, 8, 12, 40):
        calls = []

        def counted(z, calls=calls):
            calls.append(z)
            return f(z)

        options = {"eps": 0.0, "inner": inner, "jvp": jvp, "stop": stop}
        solution = newton(counted, x0, threshold=threshold, **options)
        spent = solution["nfe"] + solution["products"]
        assert threshold - 1 <= spent <= threshold
        assert len(calls) == (spent if jvp == "forward" else solution["nfe"])
        assert solution["products"] <= inner * (solution["nfe"] - 1)
        assert solution["reason"] == "threshold"
        assert (threshold >= 3) == (solution["nfe"] > 1)
        by_count = newton(f, x0, threshold=60, max_nfe=threshold, **options)
        assert torch.equal(by_count["result"], solution["result"])
        assert (by_count["reason"], by_count["nfe"]) == ("max_nfe", solution["nfe"])


def test_one_system_at_a_time():
    """With one product per step and a batch of one, GMRES(1) steps; the last of the budget too."""
    f, _, _ = batched_tanh(batch=1)
    x0 = torch.zeros(1, 12, dtype=torch.float64)
    solution = newton(f, x0, threshold=21, eps=0.0, inner=1)
    assert (solution["nfe"], solution["products"]) == (11, 10)


class Held(torch.autograd.Function):
    """The identity, by a node whose life can be watched."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, z):
        ctx.token = Token()
        Held.alive.add(ctx.token)
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Token:
    """What a node holds."""


@by_stop
def test_one_graph_at_a_time(stop):
    """Of the iterate before, nothing is left when f is evaluated; nor at the end."""
    f, _, _ = batched_tanh()
    alive = []

    def watched(z):
        gc.collect()
        alive.append(len(Held.alive))
        value = f(Held.apply(z))
        assert len(Held.alive) == alive[-1] + 1
        return value

    x0 = torch.zeros(3, 12, dtype=torch.float64)
    gc.freeze()  # else each collection walks through all modules
    try:
        solution = newton(watched, x0, threshold=60, eps=1e-9, stop=stop)
        assert solution["nfe"] >= 4
        assert alive == [0] * solution["nfe"]
        gc.collect()
        assert len(Held.alive) == 0
    finally:
        gc.unfreeze()


def test_no_gradient_is_left():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for jvp in ("reverse", "forward"):
        newton(lambda z: torch.tanh(weight * z + 1), x0, threshold=20, jvp=jvp)
    assert weight.grad is None
    assert x0.grad is None


# --- Samples ------------------------------------------------------------------------------------


@by_stop
def test_a_product_that_is_not_finite(stop):
    """sqrt has no slope at 0: the value there is finite, its derivative is not."""
    x0 = torch.zeros(3, 4, dtype=torch.float64)
    x0[[0, 2]] = 1.0

    def f(z):
        return 0.5 * torch.sqrt(z.abs()) + 0.25

    solution = newton(f, x0, threshold=60, eps=1e-9, stop=stop)
    assert solution["finite"].tolist() == [True, False, True]
    assert torch.isfinite(solution["result"]).all()
    assert torch.equal(solution["result"][1], x0[1])
    assert solution["converged"].tolist() == [True, False, True]
    alone = newton(f, x0[[0, 2]], threshold=60, eps=1e-9, stop=stop)
    torch.testing.assert_close(solution["result"][[0, 2]], alone["result"], rtol=0, atol=1e-12)
    assert solution["nfe"] == alone["nfe"]


@by_stop
@by_jvp
def test_no_product_is_finite(stop, jvp):
    x0 = torch.zeros(2, 4, dtype=torch.float64)
    solution = newton(lambda z: torch.sqrt(z.abs()) + 1, x0, jvp=jvp, stop=stop)
    assert torch.equal(solution["result"], x0)
    assert not solution["finite"].any()
    assert solution["prot_break"]
    assert solution["reason"] == "diverged"
    assert (solution["nfe"], solution["products"]) == (1, 1)


def overshooting(z):
    """g(z) = -3 atan(z - 2): from z = 4, Newton's steps grow; from 3, they do not."""
    return z - 3 * torch.atan(z - 2)


@by_stop
def test_steps_that_overshoot_are_shortened(stop):
    """After five that do not lower the residual it goes back to the start of the first."""
    x0 = torch.full((1, 1), 4.0, dtype=torch.float64)
    recorder = Recorder(overshooting)
    options = {"threshold": 120, "eps": 1e-9, "stop_mode": "abs", "stop": stop}
    solution = newton(recorder, x0, **options)
    points = [p.item() - 2 for p in recorder.points]
    # Five full steps from the start, each longer than the one before it.
    assert all(abs(after) > 1.5 * abs(before) for before, after in pairwise(points[:6]))
    # Then shares of the first of them, each at most half of the last.
    share = (points[6] - points[0]) / (points[1] - points[0])
    assert 0 < share <= 0.5
    assert all(abs(p) < abs(points[0]) for p in points[6:])
    assert solution["converged"].all()
    assert not solution["prot_break"]
    assert solution["result"].item() == pytest.approx(2.0, abs=1e-9)
    damped = newton(overshooting, x0, damping=0.3, **options)
    assert damped["converged"].all()


@by_stop
def test_what_one_sample_tries_costs_its_mates_nothing(stop):
    """The second overshoots and goes back; the first, and their points, are as they are alone."""
    x0 = torch.tensor([[3.0], [4.0], [2.5]], dtype=torch.float64)
    options = {"threshold": 120, "eps": 0.0, "stop": stop, "warmup": 1, "max_nfe": 30}
    together = Recorder(overshooting)
    newton_krylov(together, x0, **options)
    for i in range(3):
        alone = Recorder(overshooting)
        newton_krylov(alone, x0[i : i + 1], **options)
        n = min(len(alone.points), len(together.points))
        assert n >= 5
        for a, b in zip(alone.points[:n], together.points[:n], strict=True):
            assert a.item() == pytest.approx(b[i].item(), rel=1e-12)


@by_stop
@by_jvp
def test_steps_that_rise_at_first_are_kept(stop, jvp):
    """Rosenbrock's system: the first exact step raises the residual 40 times, the second solves."""

    def f(z):
        odd, even = z[:, 0::2], z[:, 1::2]
        return z + torch.stack([10 * (even - odd**2), 1 - odd], 2).flatten(1)

    x0 = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    solution = newton(f, x0, threshold=60, eps=1e-10, stop_mode="abs", jvp=jvp, stop=stop, **ENTIRE)
    assert solution["abs_trace"][1] > 5 * solution["abs_trace"][0]
    assert solution["converged"].all()
    assert solution["nfe"] == 3


def test_autocast_is_for_f_alone():
    weight = torch.diag(torch.linspace(-0.5, 0.5, 6))
    seen = set()

    def f(z):
        out = z @ weight
        seen.add(out.dtype)
        return out + 1

    for jvp in ("reverse", "forward"):
        with torch.autocast("cpu", torch.bfloat16):
            solution = newton(f, torch.zeros(2, 6), threshold=40, eps=2e-2, jvp=jvp)
        assert seen == {torch.bfloat16}
        assert solution["converged"].all()
        assert solution["result"].dtype == torch.float32
