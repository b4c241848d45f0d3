"""States as lists and as vectors, and the small convolutions."""

import pytest
import torch

from lib.errors import InputError
from lib.layer_utils import conv3x3, conv5x5, list2vec, norm_diff, vec2list

SHAPES = {
    "three scales": [(2, 4, 6), (3, 2, 3), (1, 1, 1)],
    "one": [(2, 3, 3)],
    "vectors": [(5,), (1,)],
    "with an empty one": [(2, 2), (0, 3)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name):
    torch.manual_seed(0)
    tensors = [torch.randn(3, *shape) for shape in SHAPES[name]]
    vector = list2vec(tensors)
    assert vector.shape == (3, sum(t[0].numel() for t in tensors), 1)
    back = vec2list(vector, SHAPES[name])
    assert len(back) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_order_is_channel_row_column():
    first = torch.arange(8.0).view(1, 2, 2, 2)
    second = torch.arange(8.0, 12.0).view(1, 1, 2, 2)
    assert list2vec([first, second]).flatten().tolist() == list(range(12))


def test_not_contiguous_and_gradients():
    a = torch.randn(2, 3, 4, 5, requires_grad=True)
    vector = list2vec([a.transpose(2, 3)])
    (part,) = vec2list(vector, [(3, 5, 4)])
    assert torch.equal(part, a.transpose(2, 3))
    (part * 3).sum().backward()
    assert torch.equal(a.grad, torch.full_like(a, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: list2vec([]), "at least one tensor, in a list"),
        (lambda: list2vec({"z": torch.ones(2, 3)}), "at least one tensor, in a list"),
        (lambda: list2vec([torch.ones(())]), r"each of the form \(B, ...\)"),
        (lambda: list2vec([torch.ones(2, 3), torch.ones(1, 3)]), "batch sizes differ"),
        (lambda: vec2list(torch.ones(2, 7, 1), [(2, 3)]), r"\(2, 7, 1\)"),
        (lambda: vec2list(torch.ones(6), [(2, 3)]), r"\(6,\)"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(("make", "size"), [(conv3x3, 3), (conv5x5, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(make, size, stride, bias):
    conv = make(2, 4, stride=stride, bias=bias)
    assert conv.weight.shape == (4, 2, size, size)
    assert (conv.bias is not None) == bias
    # The padding keeps the size; a stride of 2 halves it.
    assert conv(torch.zeros(1, 2, 8, 6)).shape == (1, 4, 8 // stride, 6 // stride)


def test_convolutions_have_no_bias_by_default():
    assert conv3x3(1, 1).bias is None
    assert conv5x5(1, 1).bias is None


def test_norm_diff():
    new = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    old = torch.tensor([[0.0, 4.0], [12.0, 0.0]])
    assert norm_diff(new, old) == pytest.approx(13.0)
    assert norm_diff(new, old, show_list=True) == pytest.approx([5.0, 12.0])
    assert norm_diff(new[:, :, None, None], old[:, :, None, None]) == pytest.approx(13.0)
