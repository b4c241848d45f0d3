"""mdeq_vision.convolution: the same numbers and derivatives as F.conv2d, by either library."""

import pytest
import torch
import torch.nn.functional as F

from mdeq_vision import convolution as module
from mdeq_vision.convolution import conv2d


@pytest.fixture
def as_products(monkeypatch):
    """Takes convolutions of few pixels as products, however light; counts the products."""
    monkeypatch.setattr(module, "_LEAST_WEIGHTS", 0)
    used = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: used.append(1) or real(*args))
    return used


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [(2, 2), (4, 5), (7, 7), (1, 3)], ids=str)
def test_convolutions_of_few_pixels(as_products, kernel, stride, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator).requires_grad_()
    weight = torch.randn(4, 3, kernel, kernel, generator=generator).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    padding = kernel // 2

    def everything(y, tensors):
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad(y, tensors, cotangent, create_graph=True)
        return [y, *grads, *torch.autograd.grad(grads[0].square().sum(), tensors[1])]

    found = everything(conv2d(x, weight, stride, padding), (x, weight))
    expected = everything(F.conv2d(*exact, stride=stride, padding=padding), exact)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * scale)
    assert as_products


def test_convolutions_of_many_pixels_or_light_weights_stay_convolutions(as_products, monkeypatch):
    weight = torch.randn(4, 3, 3, 3)
    conv2d(torch.randn(2, 3, 8, 8), weight, 1, 1)  # 128 pixels
    assert len(as_products) == 1
    conv2d(torch.randn(2, 3, 8, 9), weight, 1, 1)
    conv2d(torch.randn(2, 3, 4, 4).double(), weight.double(), 1, 1)
    monkeypatch.setattr(module, "_LEAST_WEIGHTS", weight.numel() + 1)
    conv2d(torch.randn(2, 3, 8, 8), weight, 1, 1)
    assert len(as_products) == 1
