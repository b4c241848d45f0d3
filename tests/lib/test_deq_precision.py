"""Equilibria under autocast: float32 states, stages of a solve, gradients; and f.plain."""

from functools import partial

import pytest
import torch
from torch import nn

from lib.deq import DEQ
from lib.solvers import SOLVERS, anderson, broyden, fixed_point_iteration
from lib.solvers.precision import COARSE_EPS
from problems import contraction

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
by_name = pytest.mark.parametrize("name", SOLVERS)


class Layer(nn.Module):
    """tanh(W z + x), which notes the number format of its products."""

    def __init__(self, size: int = 64, radius: float = 0.8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, size, generator=generator)
        self.weight = nn.Parameter(radius * weight / torch.linalg.matrix_norm(weight, ord=2))
        self.x = torch.randn(8, size, generator=generator)
        self.formats = []

    def forward(self, z):
        assert z.dtype == torch.float32
        product = z @ self.weight.t()
        self.formats.append(product.dtype)
        return torch.tanh(product.float() + self.x)


def solve(layer, deq, **options):
    layer.formats.clear()
    return deq(layer, torch.zeros_like(layer.x), f_thres=60, b_thres=60, **options)


@by_name
def test_a_solve_finishes_in_float32(name):
    layer, deq = Layer(), DEQ(partial(SOLVERS[name], eps=1e-5))
    with BF16(), torch.no_grad():
        found = solve(layer, deq, training=False)
    solution, formats = found.solution, layer.formats
    assert found.z.dtype == torch.float32
    assert solution["rel_trace"][solution["nstep"]] < 1e-5
    assert solution["converged"].float().mean() > 0.5
    assert solution["nfe"] == len(solution["rel_trace"]) == len(formats)
    # bfloat16 first, then float32, without going back.
    first = formats.index(torch.float32)
    assert first > 1
    assert formats == first * [torch.bfloat16] + (len(formats) - first) * [torch.float32]
    assert min(solution["rel_trace"][: first - 1]) >= COARSE_EPS > solution["rel_trace"][first - 1]
    # The fixed point of the float32 map, which bfloat16 alone cannot find.
    with torch.no_grad():
        exact = fixed_point_iteration(layer, found.z_star, threshold=200, eps=1e-7)["result"]
    assert (found.z_star - exact).norm() < 1e-4 * exact.norm()


@by_name
def test_a_coarse_tolerance_stays_in_bfloat16(name):
    layer, deq = Layer(), DEQ(partial(SOLVERS[name], eps=2e-2))
    with BF16(), torch.no_grad():
        found = solve(layer, deq)
    assert set(layer.formats) == {torch.bfloat16}
    assert found.solution["lowest"] < 2e-2


def test_a_solve_that_ends_early_stays_in_bfloat16():
    layer, deq = Layer(), DEQ(partial(anderson, eps=1e-5))
    with BF16(), torch.no_grad():
        found = deq(layer, torch.zeros_like(layer.x), f_thres=2)
    assert set(layer.formats) == {torch.bfloat16}
    assert found.solution["eps"] == 1e-5
    assert not found.solution["converged"].any()


def test_the_threshold_is_that_of_both_stages():
    layer = Layer(radius=0.97)
    for threshold in range(1, 20):
        layer.formats.clear()
        with BF16(), torch.no_grad():
            found = DEQ(partial(anderson, eps=0.0))(
                layer, torch.zeros_like(layer.x), f_thres=threshold, training=False
            )
        assert len(layer.formats) == found.solution["nfe"] == threshold
        assert found.solution["threshold"] == threshold


def test_outside_autocast_and_in_float64_there_are_no_stages():
    layer = Layer()
    solve(layer, DEQ(partial(anderson, eps=1e-5)))
    assert set(layer.formats) == {torch.float32}
    problem = contraction()
    with BF16(), torch.no_grad():
        found = DEQ(partial(broyden, eps=1e-10))(problem.f, problem.x0)
    torch.testing.assert_close(found.z_star, problem.solution, rtol=0, atol=1e-8)


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_stages_in_both_stop_modes(stop_mode):
    layer = Layer()
    deq = DEQ(partial(broyden, eps=1e-4), stop_mode=stop_mode)
    with BF16(), torch.no_grad():
        found = solve(layer, deq)
    assert found.solution[f"{stop_mode}_trace"][-1] < 1e-4
    assert found.solution["stop_mode"] == stop_mode


@pytest.mark.parametrize("jac_vecs", [0, 1])
def test_gradient_under_autocast(jac_vecs):
    """Close to the float32 gradient: each product of the graph rounds by 4e-3 at most."""
    deq = DEQ(partial(anderson, eps=1e-5), partial(anderson, eps=1e-5))
    grads = []
    for mixed in (False, True):
        layer = Layer()
        with BF16(enabled=mixed):
            found = solve(layer, deq, jac_vecs=jac_vecs)
            loss = found.z.square().mean()
        loss.backward()
        grads.append(layer.weight.grad)
        if mixed:
            assert torch.float32 in layer.formats  # the last iterations of both passes
            assert deq.stats.backward.last["rel_residual"] < 1e-5
    assert (grads[1] - grads[0]).norm() < 1e-2 * grads[0].norm()


def test_backward_outside_the_context_uses_the_stages_too():
    layer = Layer(radius=0.95)
    with BF16():
        found = solve(layer, DEQ(partial(anderson, eps=1e-4)))
    layer.formats.clear()
    found.z.sum().backward()
    # Whether f still gives the same; and the evaluation for the adjoint's second stage.
    assert layer.formats == [torch.bfloat16, torch.float32]


def test_a_solver_without_a_floor_runs_once():
    calls = []

    def own(f, x0, threshold, stop_mode, eps=1e-5):
        calls.append(threshold)
        return {"result": f(f(x0))}

    layer = Layer()
    with BF16(), torch.no_grad():
        DEQ(own)(layer, torch.zeros_like(layer.x), f_thres=7)
    assert calls == [7]
    assert set(layer.formats) == {torch.bfloat16}


def test_an_absolute_tolerance_that_is_met_early_ends_the_solve():
    layer = Layer()
    deq = DEQ(partial(broyden, eps=2.0), stop_mode="abs")
    with BF16(), torch.no_grad():
        found = solve(layer, deq)
    assert set(layer.formats) == {torch.bfloat16}
    assert found.solution["lowest"] < 2.0
    assert found.solution["rel_trace"][-1] > COARSE_EPS


# --- f.plain ----------------------------------------------------------------------------------


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return torch.tanh(z * weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        slope = grad * (1 - torch.tanh(z * weight).square())
        return slope * weight, (slope * z).sum(0)


@pytest.mark.parametrize("state", ["tensor", "list"])
def test_the_jacobian_loss_takes_the_plain_form(state):
    weight = nn.Parameter(torch.full((6,), 0.5))
    x = torch.linspace(-1, 1, 6)
    calls = []

    def fused(z):
        calls.append("fused")
        return NoSecondDerivative.apply(z, weight) + x

    def plain(z):
        calls.append("plain")
        return torch.tanh(z * weight) + x

    if state == "list":
        f, z0 = (lambda z: [fused(z[0])]), [torch.zeros(3, 6)]
        f.plain = lambda z: [plain(z[0])]
    else:
        f, z0 = (lambda z: fused(z)), torch.zeros(3, 6)
        f.plain = plain
    deq = DEQ("broyden")
    torch.manual_seed(0)
    found = deq(f, z0, jac_vecs=1)
    assert calls.count("plain") == 1
    found.jac_loss.backward()
    assert weight.grad.abs().sum() > 0
    calls.clear()
    deq(f, z0)
    assert "plain" not in calls
