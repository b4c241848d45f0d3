"""The segmentation loss against PyTorch's own and against a loop over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.errors import InputError
from mdeq_vision.losses import SegmentationLoss, mean_loss

N = 5
WEIGHTS = [0.8, 1.1, 0.9, 1.3, 1.0]


def batch(seed=0, size=(6, 7), low=None, dtype=torch.float64):
    """Logits (3, N, ...) and a label (3, *size) 27 of whose pixels are 255."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(3, N, *(low or size), dtype=dtype)
    label = torch.randint(N, (3, *size))
    label.view(-1)[torch.randperm(label.numel())[:27]] = 255
    return logits.requires_grad_(), label


def by_hand(logits, label, weights, thres, keep, ignore=255):
    """The OHEM loss of logits at the label's size, pixel by pixel: (total, kept)."""
    logits, label = logits.detach().numpy(), label.numpy()
    pixels = []
    for b, y, x in np.ndindex(label.shape):
        true = label[b, y, x]
        if true != ignore:
            scores = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
            pixels.append((scores[true] / scores.sum(), weights[true]))
    if not pixels:
        return 0.0, 0
    ascending = sorted(p for p, _ in pixels)
    threshold = max(thres, ascending[min(keep, len(ascending) - 1)])
    kept = [(p, w) for p, w in pixels if p < threshold]
    return sum(-w * math.log(p) for p, w in kept), len(kept)


# ---- plain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignore", [255, -1, 2])
def test_plain_loss_is_cross_entropy(weights, ignore):
    logits, label = batch()
    label[label == 255] = ignore
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = nn.CrossEntropyLoss(tensor, ignore_index=ignore)(logits, label)
    loss = SegmentationLoss(class_weights=weights, ignore_label=ignore)
    total, weight = loss(logits, label)
    assert total.shape == weight.shape == ()
    found = mean_loss(total, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


def test_logits_are_resized_to_the_label():
    logits, label = batch(size=(9, 14), low=(3, 5))
    loss = SegmentationLoss(class_weights=WEIGHTS)
    large = F.interpolate(logits, (9, 14), mode="bilinear", align_corners=True)
    torch.testing.assert_close(loss(logits, label), loss(large, label))


@pytest.mark.parametrize("ohem", [False, True])
def test_several_processes_divide_by_the_summed_weight(ohem):
    """Without a keep that spans the batch, shares of it add up to the whole."""
    logits, label = batch()
    loss = SegmentationLoss(class_weights=WEIGHTS, ohem=ohem, ohem_thres=0.5, ohem_keep=0)
    parts = [loss(logits[i : i + 1], label[i : i + 1]) for i in range(3)]
    total, weight = (sum(values) for values in zip(*parts, strict=True))
    torch.testing.assert_close((total, weight), loss(logits, label))


# ---- hard pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("thres", [0.05, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("keep", [0, 1, 40, 98, 99, 100, 100_000])
def test_ohem_is_that_of_a_loop(weights, thres, keep):
    logits, label = batch()
    assert (label != 255).sum() == 99  # so that keeps just around it are among those above
    loss = SegmentationLoss(class_weights=weights, ohem=True, ohem_thres=thres, ohem_keep=keep)
    total, weight = loss(logits, label)
    expected, kept = by_hand(logits, label, weights or [1.0] * N, thres, keep)
    assert weight == kept
    torch.testing.assert_close(total.item(), expected, rtol=1e-12, atol=0)


def test_probability_at_the_threshold_is_not_hard():
    logits = torch.zeros(1, 4, 2, 3)  # p = 1/4 everywhere
    label = torch.zeros(1, 2, 3, dtype=torch.int64)
    for thres, kept in ((0.25, 0), (0.26, 6)):
        loss = SegmentationLoss(ohem=True, ohem_thres=thres, ohem_keep=3)
        assert loss(logits, label)[1] == kept


@pytest.mark.parametrize("keep", [0, 30])
def test_ohem_gradients(keep):
    logits, label = batch()
    loss = SegmentationLoss(class_weights=WEIGHTS, ohem=True, ohem_thres=0.3, ohem_keep=keep)
    assert torch.autograd.gradcheck(lambda z: mean_loss(*loss(z, label)), logits)


def test_plain_gradients():
    logits, label = batch(size=(5, 6), low=(3, 2))
    loss = SegmentationLoss(class_weights=WEIGHTS)
    assert torch.autograd.gradcheck(lambda z: mean_loss(*loss(z, label)), logits)


# ---- no pixels -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("low", [None, (3, 3)])
def test_all_ignored(weights, ohem, low):
    logits, label = batch(low=low)
    total, weight = SegmentationLoss(class_weights=weights, ohem=ohem)(
        logits, torch.full_like(label, 255)
    )
    assert total == weight == 0
    mean_loss(total, weight).backward()
    assert (logits.grad == 0).all()


def test_none_kept():
    logits = torch.zeros(1, N, 4, 4, requires_grad=True)
    loss = SegmentationLoss(ohem=True, ohem_thres=0.1)
    total, weight = loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64))
    mean = mean_loss(total, weight)
    assert mean == weight == 0
    mean.backward()
    assert (logits.grad == 0).all()


# ---- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype, ohem):
    logits, label = batch(low=(3, 3), dtype=torch.float32)
    logits = logits.detach().to(dtype).requires_grad_()
    loss = SegmentationLoss(class_weights=WEIGHTS, ohem=ohem, ohem_keep=10)
    total, weight = loss(logits, label)
    assert total.dtype == weight.dtype == torch.promote_types(dtype, torch.float32)
    expected = loss(logits.detach().double(), label)
    # The same numbers went in: what is lost is the rounding of float32.
    torch.testing.assert_close((total, weight), expected, rtol=1e-5, atol=0, check_dtype=False)
    total.backward()
    assert logits.grad.dtype == dtype


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, N, 19])
def test_label_that_is_no_class(value):
    logits, label = batch()
    label[1, 2, 3] = value
    with pytest.raises(InputError, match=rf"label {value} is neither a class in 0\.\.4 nor .* 255"):
        SegmentationLoss()(logits, label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ohem_thres": 0.0}, "ohem_thres is 0.0"),
        ({"ohem_thres": 1.5}, "ohem_thres is 1.5"),
        ({"ohem_keep": -1}, "ohem_keep is -1"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must be finite"),
        ({"class_weights": [1.0, math.nan]}, "class_weights must be finite"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        SegmentationLoss(**options)


def test_shapes_that_do_not_fit():
    logits, label = batch()
    loss = SegmentationLoss()
    with pytest.raises(InputError, match=r"logits \(3, 5, 6, 7\) and label \(2, 6, 7\)"):
        loss(logits, label[:2])
    with pytest.raises(InputError, match="do not fit"):
        loss(logits, label[:, None])
    with pytest.raises(InputError, match=r"torch\.uint8"):
        loss(logits, label.to(torch.uint8))
    with pytest.raises(InputError, match="class_weights has 2 numbers, but the logits have 5"):
        SegmentationLoss(class_weights=[1.0, 2.0])(logits, label)
