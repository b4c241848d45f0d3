"""deq_sequence.linear: the same numbers and derivatives as F.linear, by either library."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from deq_sequence import linear as module
from deq_sequence.linear import _Half, linear

SHAPES = [(2, 150, 24), (600, 24), (8, 16, 9), (2, 3, 64, 8), (150, 24), (151, 24), (4, 24)]


@pytest.fixture(params=[False, True], ids=["F.linear", "convolution"])
def by_convolution(request, monkeypatch):
    """Either way, whatever this machine would choose; says whether convolutions were used."""
    monkeypatch.setattr(module, "convolutions_are_faster", lambda: request.param)
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


def test_the_choice_is_a_constant_to_the_compiler(by_convolution):
    """Reading the processor's name would end the graph."""
    chosen, used = by_convolution
    x, weight = torch.randn(300, 8), torch.randn(4, 8)
    torch._dynamo.reset()
    found = torch.compile(linear, backend="eager", fullgraph=True)(x, weight)
    assert bool(used) == chosen
    torch.testing.assert_close(found, F.linear(x, weight))


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


@pytest.mark.parametrize("bias", [True, False])
def test_half_precision_keeps_no_second_weight(bias):
    """Under autocast: the same bits as autocast itself, with no copy of the weight for backward."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    tensors = [x, weight, *([torch.randn(6, requires_grad=True)] if bias else [])]
    g = torch.randn(3, 5, 6).bfloat16()

    def run(form):
        """The result and the gradients, and what of the weight's shape is kept in between."""
        saved = []
        hooks = lambda t: saved.append(t) or t, lambda t: t
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(*hooks),
        ):
            out = form(*tensors)
        kept = [t for t in saved if t.shape in (weight.shape, weight.t().shape)]
        return [out, *torch.autograd.grad(out, tensors, g)], kept

    (expected, copies), (found, kept) = run(F.linear), run(linear)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {t.dtype for t in copies} == {torch.bfloat16}
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_second_derivatives_in_half_precision():
    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    tensors = draw(2, 3, 4), draw(5, 4), draw(5)
    assert torch.autograd.gradcheck(_Half.apply, tensors)
    assert torch.autograd.gradgradcheck(_Half.apply, tensors)
