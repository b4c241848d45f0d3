"""Reversible iterations: exact, constant memory, and honest where they cannot be undone."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from lib.deq import DEQ, DEQWarning
from lib.errors import InputError
from lib.gradients.iterations import Reversible
from problems import largest_relative_error
from toy_layers import ConvTanh, Toy, gradients, loss_of


def coupled(layer: nn.Module, z0: Tensor, n: int, b: float) -> Tensor:
    y = z = z0
    for _ in range(n):
        y = (1 - b) * y + b * layer(z)
        z = (1 - b) * z + b * layer(y)
    return z


@pytest.mark.parametrize("layer", [Toy, ConvTanh])
@pytest.mark.parametrize(("n", "b"), [(1, 0.8), (3, 0.8), (8, 0.8), (16, 0.5), (30, 0.3)])
def test_reversible_is_its_own_unrolled_iteration(layer, n, b):
    layer = layer()
    expected = coupled(layer, layer.z0, n, b)
    deq = DEQ(grad=Reversible(b))
    z = deq(layer, layer.z0, f_thres=2 * n).z
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)
    grads = gradients(loss_of(z), layer)
    assert largest_relative_error(grads, gradients(loss_of(expected), layer)) <= 1e-8
    assert deq.stats.forward.last["nfe"] == 2 * n


def test_reversible_in_float32():
    """The pair is float64, and f sees float32: still the gradient of the iteration, to rounding."""
    layer = Toy().float()
    layer.z0 = layer.z0.float()
    z = DEQ(grad=Reversible(0.8))(layer, layer.z0, f_thres=12).z
    assert z.dtype == torch.float32
    expected = gradients(loss_of(coupled(layer, layer.z0, 6, 0.8)), layer)
    assert largest_relative_error(gradients(loss_of(z), layer), expected) <= 1e-5


def test_reversible_twice_over_a_retained_graph():
    layer = Toy()
    z = DEQ(grad="reversible:damping=0.8")(layer, layer.z0, f_thres=8).z
    expected = gradients(loss_of(coupled(layer, layer.z0, 4, 0.8)), layer)
    for keep in (True, True, False):
        error = largest_relative_error(gradients(loss_of(z), layer, retain_graph=keep), expected)
        assert error <= 1e-10


def test_reversible_with_two_pending():
    layers = Toy(seed=1), Toy(seed=2)
    deq = DEQ(grad="reversible:damping=0.8")
    losses = [loss_of(deq(layer, layer.z0, f_thres=8).z) for layer in layers]
    for layer, loss in zip(layers, losses, strict=True):
        expected = gradients(loss_of(coupled(layer, layer.z0, 4, 0.8)), layer)
        assert largest_relative_error(gradients(loss, layer), expected) <= 1e-10


def test_reversible_evaluates_each_point_twice():
    layer, calls = Toy(), []
    deq = DEQ(grad="reversible:damping=0.8")

    def f(z):
        calls.append(z.detach().clone())
        return layer(z)

    z = deq(f, layer.z0, f_thres=8).z
    assert len(calls) == 8
    loss_of(z).backward()
    assert len(calls) == 16
    for there, back in zip(calls[:8], reversed(calls[8:]), strict=True):
        torch.testing.assert_close(there, back, rtol=0, atol=1e-9)


def test_reversible_steps_are_bounded():
    with pytest.raises(InputError, match=r"f_thres is 80.*lower f_thres to 27") as caught:
        DEQ(grad="reversible:damping=0.8")(torch.tanh, torch.zeros(1, 2), f_thres=80)
    assert "\n" not in str(caught.value)


def test_reversible_recovers_what_f_would_amplify():
    """Rounding errors that f blows up do not arise: on the way back it is given the same bits."""
    layer = Toy()

    def f(z):
        return torch.tanh(6 * z @ layer.w.T + layer.x)

    z = DEQ(grad="reversible:damping=0.8")(f, layer.z0, f_thres=26).z
    expected = layer.z0
    y = expected
    for _ in range(13):
        y = (1 - 0.8) * y + 0.8 * f(expected)
        expected = (1 - 0.8) * expected + 0.8 * f(y)
    found, exact = (torch.autograd.grad(t.sum(), layer.w)[0] for t in (z, expected))
    assert largest_relative_error([found], [exact]) <= 1e-8


def test_reversible_warns_where_the_start_is_not_recovered():
    """f that is not quite the same at every call (a device's sums in no fixed order, say)."""
    layer, noise = Toy(), torch.Generator().manual_seed(0)

    def f(z):
        return layer(z) + 1e-12 * torch.randn(3, 6, generator=noise, dtype=torch.float64)

    z = DEQ(grad="reversible:damping=0.8")(f, layer.z0, f_thres=8).z
    with pytest.warns(DEQWarning, match="misses its start"):
        z.sum().backward()
    z = DEQ(grad="reversible:damping=0.8")(layer, layer.z0, f_thres=8).z
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z.sum().backward()


def test_reversible_with_a_map_that_differs_from_call_to_call():
    layer, calls = Toy(), []

    def f(z):
        calls.append(0)
        scale = torch.exp(layer.b.sum()) if len(calls) == 1 else 1.0
        return layer(z) * scale

    z = DEQ(grad="reversible:damping=0.8")(f, layer.z0, f_thres=4).z
    with pytest.raises(RuntimeError, match="the same at every call"):
        z.sum().backward()
