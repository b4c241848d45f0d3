"""lib.linear: the same numbers and derivatives as F.linear and F.conv2d, by either library."""

import pytest
import torch
import torch.nn.functional as F

from lib import linear as module
from lib.linear import conv2d, linear

SHAPES = [(2, 150, 24), (600, 24), (8, 16, 9), (2, 3, 64, 8), (150, 24), (151, 24), (4, 24)]


@pytest.fixture(params=[False, True], ids=["F.linear", "convolution"])
def by_convolution(request, monkeypatch):
    """Either way, whatever this machine would choose; says whether convolutions were used."""
    monkeypatch.setattr(module, "_convolutions_are_faster", lambda: request.param)
    used = []
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: used.append(1) or real(*args))
    return request.param, used


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["no bias", "bias", "bias of the result's shape"])
def test_values_and_derivatives(by_convolution, shape, kind):
    chosen, used = by_convolution
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator).requires_grad_()

    inputs = [draw(*shape), draw(10, shape[-1])]
    if kind != "no bias":
        inputs.append(draw(*([10] if kind == "bias" else [*shape[:-1], 10])))
    cotangent = torch.randn(*shape[:-1], 10, generator=generator)

    def everything(product, tensors):
        y = product(tensors)
        grads = torch.autograd.grad(y, tensors, cotangent.to(y.dtype), create_graph=True)
        # Second derivatives, as the Jacobian loss takes them.
        second = torch.autograd.grad(grads[0].square().sum(), tensors[1])
        return [y, *grads, *second]

    found = everything(lambda t: linear(*t), inputs)
    rows = shape[:-1]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = everything(lambda t: t[0] @ t[1].t() + (t[2] if len(t) > 2 else 0), exact)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * scale)
    n_rows = torch.Size(rows).numel()
    assert bool(used) == (chosen and n_rows >= 128 and n_rows % 2 == 0)


def test_other_formats_take_the_usual_way(by_convolution):
    _, used = by_convolution
    x, weight = torch.randn(300, 8), torch.randn(4, 8)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert not used


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False),
     ("GenuineIntel", "AVX512", False)],
)  # fmt: skip
def test_who_made_the_processor_decides(maker, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(module, "_made_by_intel", lambda: maker == "GenuineIntel")
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert module._mkl_holds_back.__wrapped__() is expected


# --- Convolutions -----------------------------------------------------------------------------


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
