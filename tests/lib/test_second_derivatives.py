"""Second derivatives through an equilibrium: right with order=2, else refused."""

import pytest
import torch
from torch import nn

from lib.deq import DEQ
from lib.errors import InputError
from problems import largest_relative_error
from toy_layers import ConvTanh, Toy, TwoScales, gradients, loss_of

TIGHT = "broyden:eps=1e-13"
EXACT = DEQ(TIGHT, "gmres:eps=1e-13", grad="ift:order=2")
THRESHOLDS = {"f_thres": 100, "b_thres": 100}


def through(layer: nn.Module):
    return EXACT(layer, layer.z0, **THRESHOLDS).z


def unrolled(layer: nn.Module):
    z = layer.z0
    for _ in range(90):
        z = layer(z)
    return z


@pytest.mark.parametrize("layer", [Toy, ConvTanh, TwoScales])
def test_gradient_penalty(layer):
    """d/dp of L + ||dL/dp||^2, against the unrolled iteration."""
    layer, found = layer(), []
    for solve in (through, unrolled):
        loss = loss_of(solve(layer))
        first = gradients(loss, layer, create_graph=True)
        total = loss + sum(g.square().sum() for g in first)
        found.append((first, gradients(total, layer)))
    for ours, expected in zip(*found, strict=True):
        assert largest_relative_error(ours, expected) <= 1e-8


def test_linear_loss():
    """dL/dz does not depend on z here, but the adjoint does."""
    layer, found = Toy(), []
    for solve in (through, unrolled):
        first = gradients(solve(layer).sum(), layer, create_graph=True)
        found.append(gradients(sum(g.square().sum() for g in first), layer))
    assert largest_relative_error(*found) <= 1e-8


def test_gradgradcheck():
    kernel = nn.Parameter(0.1 * torch.randn(1, 1, 3, 3, dtype=torch.float64))
    x = nn.Parameter(torch.randn(1, 1, 2, 2, dtype=torch.float64))

    def solve(kernel, x):
        def f(z):
            return torch.tanh(nn.functional.conv2d(z, kernel, padding=1) + x)

        return EXACT(f, torch.zeros_like(x), **THRESHOLDS).z

    assert torch.autograd.gradcheck(solve, (kernel, x))
    assert torch.autograd.gradgradcheck(solve, (kernel, x))


def test_hessian():
    """z = a z + x: d2z/da2 = 2 x / (1 - a)^3."""

    def loss(a):
        return EXACT(lambda z: a * z + 1, torch.zeros(1, 1, dtype=torch.float64)).z.sum()

    at = torch.tensor(0.5, dtype=torch.float64)
    assert torch.autograd.functional.hessian(loss, at).item() == pytest.approx(16)


def test_third_derivatives_are_refused():
    layer = Toy()
    first = gradients(loss_of(through(layer)), layer, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        gradients(sum(g.square().sum() for g in first), layer, create_graph=True)


def test_orders():
    with pytest.raises(InputError, match="order is 3, but must be 1 or 2"):
        DEQ(grad="ift:order=3")
