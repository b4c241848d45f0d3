"""GRAPH without a GPU, and steps whose f comes from recorded operations."""

import pytest
import torch

import small_vision
from lib.deq import DEQWarning
from recorded_graphs import check_steps

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


def outputs(**changes):
    torch.manual_seed(0)
    model = small_vision.build("cls", **changes)
    torch.manual_seed(1)
    output, _, _ = model(small_vision.images(8, 8), f_thres=3, b_thres=3)
    output.square().sum().backward()
    return model, [output, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_the_key_without_a_gpu():
    _, expected = outputs()
    with pytest.warns(DEQWarning, match="no CUDA graph: f is on no GPU"):
        model, found = outputs(GRAPH=True)
    assert model.deq.graphs is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("amp", [False, True])
def test_f_from_its_source(amp):
    """What f holds is all that differs between two forward passes."""
    model, _ = outputs(DROPOUT=0.3, WNORM=True)
    layer = model.fullstage.float()
    z = [torch.randn(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(layer.channels)]
    injection = torch.randn_like(z[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.no_grad():
        first, second = (layer.prepare(k * injection, z) for k in (1, 2))
        (make, _), (_, held) = first.source(), second.source()
        found, expected, other = make(held)(z), second(z), first(z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(other[0], expected[0])


@pytest.mark.parametrize("check_every", [1, 99])
@pytest.mark.parametrize("amp", [False, True])
def test_steps_from_a_recording(amp, check_every):
    def made():
        torch.manual_seed(0)
        model, images = (
            small_vision.build("cls", WNORM=True, DROPOUT=0.1),
            small_vision.images(8, 8),
        )
        model.f_solver = model.b_solver = f"broyden:check_every={check_every}"

        def forward(step):
            output, _, _ = model(step + images.float(), f_thres=9, b_thres=9)
            return output.float().square().mean()

        return model.float(), forward

    check_steps(made, amp=amp)


def test_no_source_with_a_hook():
    model, _ = outputs()
    layer = model.fullstage
    z = [torch.zeros(2, c, 8 // 2**i, 8 // 2**i).double() for i, c in enumerate(layer.channels)]
    assert hasattr(layer.prepare(z[0], z), "source")
    handle = layer.branches[0].register_forward_hook(lambda *_: None)
    assert not hasattr(layer.prepare(z[0], z), "source")
    handle.remove()
    layer._is_replica = True
    assert not hasattr(layer.prepare(z[0], z), "source")
