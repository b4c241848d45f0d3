"""The implicit gradient against unrolled autograd and dense solves, and how the wrapper behaves."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from lib.deq import DEQ, stacked
from lib.errors import InputError
from lib.jacobian import jac_loss_estimate
from lib.solvers import ADJOINT_SOLVERS, SOLVERS, anderson, broyden
from problems import largest_relative_error
from toy_layers import ConvTanh, Fragile, Toy, TwoScales, gradients, loss_of, unrolled_gradients

# Both solves end at 1e-13, five digits below what is asserted of the gradients.
tight, tight_adjoint = (
    {name: partial(solver, eps=1e-13) for name, solver in solvers.items()}
    for solvers in (SOLVERS, ADJOINT_SOLVERS)
)
THRESHOLD = 300


LAYERS = {"toy": Toy, "rank 4": ConvTanh, "list": TwoScales}
by_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def dense_gradients(layer: nn.Module) -> list[Tensor]:
    """dL/dtheta = y' df/dtheta with (I - J)' y = dL/dz, J written out as a matrix."""
    is_list = isinstance(layer.z0, list)
    parts = layer.z0 if is_list else [layer.z0]

    def flat(tensors) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])

    def f(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parts])
        z = [v.view(p.shape) for v, p in zip(pieces, parts, strict=True)]
        return flat(layer(z)) if is_list else layer(z[0]).flatten()

    with torch.no_grad():
        z = flat(parts)
        for _ in range(300):
            z = f(z)
    z.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, z)
    (grad,) = torch.autograd.grad(loss_of(z), z)
    adjoint = torch.linalg.solve((torch.eye(len(z), dtype=z.dtype) - jacobian).T, grad)
    return list(torch.autograd.grad(f(z), list(layer.parameters()), adjoint))


@cache
def expected_gradients(make) -> tuple[list[Tensor], list[Tensor]]:
    """Of the layer that ``make`` makes: unrolled, and by dense solves."""
    layer = make()
    return unrolled_gradients(layer), dense_gradients(layer)


@by_layer
@pytest.mark.parametrize("f_solver", tight)
@pytest.mark.parametrize("b_solver", tight_adjoint)
def test_gradient(layer, f_solver, b_solver):
    by_unrolling, by_dense_solves = expected_gradients(layer)
    layer = layer()
    deq = DEQ(tight[f_solver], tight_adjoint[b_solver])
    z = deq(layer, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD).z
    found = gradients(loss_of(z), layer)
    unrolled = largest_relative_error(found, by_unrolling)
    dense = largest_relative_error(found, by_dense_solves)
    print(f"relative error against unrolled {unrolled:.1e}, against dense {dense:.1e}")
    assert unrolled <= 1e-7
    assert dense <= 1e-7


def test_gradcheck():
    """Every entry of both Jacobians; on a part of the state, as each entry takes solves."""
    layer = ConvTanh()
    x = layer.x[:1, :, :3, :2].detach().requires_grad_()
    deq = DEQ(tight["broyden"])

    def through(kernel, x):
        def f(z):
            return torch.tanh(nn.functional.conv2d(z, kernel, padding=1) + x)

        return deq(f, torch.zeros_like(x), f_thres=THRESHOLD, b_thres=THRESHOLD).z

    assert torch.autograd.gradcheck(through, (layer.kernel, x))


def test_undefined_gradient(deq):
    """An operation behind z may say that it has no gradient at all: None, not zeros."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    layer = Toy()
    loss = NoGradient.apply(run(deq, layer).z) + layer.b.sum()
    found = gradients(loss, layer, materialize_grads=True)
    expected_grads = gradients(layer.b.sum(), layer, materialize_grads=True)
    for grad, expected in zip(found, expected_grads, strict=True):
        assert torch.equal(grad, expected)


def test_gradient_in_float32():
    layer = Toy().float()
    layer.z0 = layer.z0.float()
    z = DEQ(partial(broyden, eps=1e-6))(layer, layer.z0, f_thres=60, b_thres=60).z
    found = gradients(loss_of(z), layer)
    # eps times the condition of I - J, below 10.
    assert largest_relative_error(found, unrolled_gradients(layer)) < 1e-5


# --- Orders of forward and backward -----------------------------------------------------------


@pytest.fixture
def deq():
    return DEQ(tight["broyden"])


def run(deq: DEQ, layer: nn.Module, **options):
    return deq(layer, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD, **options)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(deq, order):
    layers = Toy(seed=1), Toy(seed=2)
    losses = [loss_of(run(deq, layer).z) for layer in layers]
    for i in order:
        found = gradients(losses[i], layers[i])
        assert largest_relative_error(found, unrolled_gradients(layers[i])) <= 1e-7


def test_two_forwards_of_one_layer_in_one_backward(deq):
    layer = Toy()
    loss = loss_of(run(deq, layer).z) + loss_of(run(deq, layer).z, power=3)
    found = gradients(loss, layer)
    parts = zip(unrolled_gradients(layer), unrolled_gradients(layer, power=3), strict=True)
    assert largest_relative_error(found, [a + b for a, b in parts]) <= 1e-7


def test_equilibrium_of_an_equilibrium(deq):
    """The second solve is injected with the first one's result."""
    first, second = Toy(seed=1), Toy(seed=2)

    def loss(solve) -> Tensor:
        z = solve(first, first.z0)
        return loss_of(solve(lambda y: second(y) + 0.1 * z, second.z0))

    def unroll(f, z):
        for _ in range(200):
            z = f(z)
        return z

    both = nn.ModuleList([first, second])
    found = gradients(loss(lambda f, z: deq(f, z, f_thres=200, b_thres=200).z), both)
    assert largest_relative_error(found, gradients(loss(unroll), both)) <= 1e-7


def test_backward_after_an_exception_in_the_adjoint(deq, fragile):
    layer = Toy()
    loss = loss_of(deq(lambda z: layer(Fragile.apply(z)), layer.z0, f_thres=200, b_thres=200).z)
    fragile("raise")
    with pytest.raises(ZeroDivisionError, match="inside the adjoint"):
        gradients(loss, layer, retain_graph=True)
    fragile("fine")
    expected = unrolled_gradients(layer)
    assert largest_relative_error(gradients(loss, layer), expected) <= 1e-7
    assert largest_relative_error(gradients(loss_of(run(deq, layer).z), layer), expected) <= 1e-7


@pytest.mark.parametrize("where", ["loss", "z"])
def test_double_backward_is_refused(deq, where):
    layer = Toy()
    z = run(deq, layer).z
    if where == "loss":
        first = gradients(loss_of(z), layer, create_graph=True)
    else:  # a gradient that is linear in z still has a second derivative through the adjoint
        first = gradients(z.sum(), layer, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives through an equilibrium"):
        gradients(sum(g.square().sum() for g in first), layer)


def test_create_graph_alone_is_right(deq):
    layer = Toy()
    found = gradients(loss_of(run(deq, layer).z), layer, create_graph=True)
    assert largest_relative_error(found, unrolled_gradients(layer)) <= 1e-7


# --- Jacobian loss, evaluation ----------------------------------------------------------------


def test_jacobian_loss_trains_along(deq):
    """L + c ||v'J||^2 / n with J at a detached z*: both parts against their own graphs."""
    layer = Toy()
    torch.manual_seed(7)
    found = run(deq, layer, jac_vecs=2)
    total = gradients(loss_of(found.z) + 0.3 * found.jac_loss, layer)

    torch.manual_seed(7)
    point = found.z_star.clone().requires_grad_()
    jac_loss = jac_loss_estimate(layer(point), point, vecs=2)
    assert found.jac_loss.item() == pytest.approx(jac_loss.item(), rel=1e-12)
    jac_grads = torch.autograd.grad(jac_loss, list(layer.parameters()), materialize_grads=True)
    parts = zip(unrolled_gradients(layer), jac_grads, strict=True)
    assert largest_relative_error(total, [a + 0.3 * b for a, b in parts]) <= 1e-7


@by_layer
def test_evaluation_gives_z_star_itself_with_gradients(layer, deq):
    layer = layer()
    found = run(deq, layer, training=False)
    is_list = isinstance(found.z, list)
    pairs = zip(found.z, found.z_star, strict=True) if is_list else [(found.z, found.z_star)]
    for z, z_star in pairs:
        assert torch.equal(z, z_star)
        assert z.requires_grad
        assert not z_star.requires_grad
    grads = gradients(loss_of(found.z), layer)
    assert largest_relative_error(grads, unrolled_gradients(layer)) <= 1e-7


def test_training_gives_f_of_z_star():
    layer = Toy()
    deq = DEQ(partial(anderson, eps=0.0))
    found = deq(layer, layer.z0, f_thres=4)
    assert torch.equal(found.z, layer(found.z_star))
    assert not torch.equal(found.z, found.z_star)
    with torch.no_grad():
        again = deq(layer, layer.z0, f_thres=4)
        assert torch.equal(again.z, found.z)
        assert not again.z.requires_grad
        assert torch.equal(deq(layer, layer.z0, f_thres=4, training=False).z, found.z_star)


def test_spectral_radius_of_the_layer(deq):
    layer = Toy()
    found = run(deq, layer, sradius_iters=100)
    for b in range(3):
        z = found.z_star[b : b + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda y, b=b: torch.tanh(y @ layer.w.T + (layer.x @ layer.u.T + layer.b)[b]), z
        )[0, :, 0]
        exact = torch.linalg.eigvals(jacobian).abs().max()
        assert found.sradius[b].item() == pytest.approx(exact.item(), rel=1e-6)


def test_what_is_not_asked_for_is_zero(deq):
    found = run(deq, Toy())
    assert found.jac_loss.item() == 0
    assert found.sradius.tolist() == [[0.0]] * 3


def test_no_gradient_stays_on_the_state_or_on_z0(deq):
    layer = Toy()
    loss_of(run(deq, layer).z).backward()
    assert layer.z0.grad is None


def test_layer_without_parameters(deq):
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    found = deq(torch.cos, z0, f_thres=100)
    assert found.z.flatten().tolist() == pytest.approx([0.7390851332151607] * 6, rel=1e-12)
    # Gradient with respect to nothing, but still a usable tensor in a larger graph.
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    (weight * found.z).sum().backward()
    assert weight.grad.item() == pytest.approx(6 * 0.7390851332151607)


def test_layer_that_ignores_its_state(deq):
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    deq(lambda z: 2 * x + 0 * z.detach(), torch.zeros_like(x)).z.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_stacked_network():
    layer = Toy()
    z = stacked(layer, layer.z0, 3)
    assert torch.equal(z, layer(layer(layer(layer.z0))))
    with pytest.raises(InputError, match="0"):
        stacked(layer, layer.z0, 0)
