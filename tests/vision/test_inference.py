"""Sliding, multi-scale and flipped prediction against direct forward passes and plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.errors import InputError
from mdeq_vision.inference import predict, predict_classes

N = 4


@pytest.fixture
def network():
    """A small network that looks around, with logits at half the resolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, N, 3, padding=1)
    ).double()


def images(height, width, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def direct(network, x):
    """Probabilities of whole images at their own size."""
    large = F.interpolate(network(x), x.shape[2:], mode="bilinear", align_corners=True)
    return large.softmax(1)


def by_loop(network, x, window):
    """Windows of (width, height) at strides of two thirds, averaged by count, pixel by pixel."""
    height, width = x.shape[2:]
    w, h = min(window[0], width), min(window[1], height)

    def starts(size, side):
        found = [0]
        while found[-1] + side < size:
            found.append(min(found[-1] + max(side * 2 // 3, 1), size - side))
        return found

    total = torch.zeros(len(x), N, height, width, dtype=x.dtype)
    count = torch.zeros(height, width)
    for top in starts(height, h):
        for left in starts(width, w):
            part = direct(network, x[:, :, top : top + h, left : left + w])
            for i in range(h):
                for j in range(w):
                    total[:, :, top + i, left + j] += part[:, :, i, j]
                    count[top + i, left + j] += 1
    assert (count > 0).all()
    return total / count


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ---- one window ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("slack", [0, 5])
def test_image_within_the_window_is_one_forward(network, size, slack):
    x = images(*size)
    window = (size[1] + slack, size[0] + slack)
    seen = []

    def forward(part):
        seen.append(part.shape)
        return network(part)

    found = predict(forward, x, window=window, base_size=max(size))
    assert seen == [x.shape]
    close(found, direct(network, x))
    assert not found.requires_grad


# ---- sliding windows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((12, 20), (9, 7)),  # (height, width), (width, height)
        ((12, 20), (9, 30)),  # the width alone exceeds the window
        ((20, 12), (30, 9)),  # the height alone
        ((12, 20), (20, 12)),  # exactly one
        ((12, 20), (19, 11)),  # two that nearly coincide
        ((5, 6), (1, 1)),
        ((5, 9), (2, 3)),
    ],
)
def test_windows_are_averaged_by_count(network, size, window):
    x = images(*size)
    close(predict(network, x, window=window, base_size=max(size)), by_loop(network, x, window))


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.3)])
@pytest.mark.parametrize("base_size", [20, 13])
def test_classes_are_the_maximum_of_the_probabilities(network, scales, base_size):
    x = images(12, 20)
    options = {"window": (9, 7), "base_size": base_size, "scales": scales, "flip": True}
    best, labels = predict(network, x, **options).max(dim=1)
    found = predict_classes(network, x, **options)
    assert torch.equal(found[0], labels)
    assert len(labels.unique()) > 1
    close(found[1], best)


# ---- flips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(40, 40), (9, 7)])
def test_flip_averages_with_the_mirrored_image(network, window):
    x = images(12, 20)
    options = {"window": window, "base_size": 20}
    mirrored = predict(network, x.flip(3), **options).flip(3)
    expected = (predict(network, x, **options) + mirrored) / 2
    close(predict(network, x, flip=True, **options), expected)


# ---- scales ----------------------------------------------------------------------------------


def test_scales_are_averaged(network):
    x = images(12, 20)
    expected = 0
    for long, short in ((10, 6), (20, 12), (35, 21)):
        resized = F.interpolate(x, (short, long), mode="bilinear", align_corners=False)
        part = by_loop(network, resized, (22, 22))
        expected += F.interpolate(part, (12, 20), mode="bilinear", align_corners=True) / 3
    found = predict(network, x, window=(22, 22), base_size=20, scales=(0.5, 1.0, 1.75))
    close(found, expected)


def test_base_size_is_the_long_side(network):
    seen = []

    def forward(part):
        seen.append(tuple(part.shape[2:]))
        return network(part)

    for size in ((12, 20), (20, 12), (3, 90)):
        predict(forward, images(*size), window=(99, 99), base_size=35, scales=(1.0, 0.5))
    assert seen == [(21, 35), (11, 18), (35, 21), (18, 11), (1, 35), (1, 18)]


# ---- dtypes and bad input --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_add_up_in_every_dtype(network, dtype):
    network.to(dtype)
    x = images(12, 20).to(dtype)
    found = predict(network, x, window=(9, 7), base_size=20, scales=(1.0, 1.25), flip=True)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 8)}, r"window is \(0, 8\)"),
        ({"window": (8,)}, "window is"),
        ({"base_size": 0}, "base_size is 0"),
        ({"scales": ()}, "scales are"),
        ({"scales": (1.0, -0.5)}, "scales are"),
        ({"images": torch.zeros(3, 8, 8)}, r"shape \(3, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"torch\.uint8"),
        ({"forward": lambda x: (x,)}, "forward gave tuple"),
        ({"forward": lambda x: x[:, 0]}, r"forward gave \(1, 8, 8\)"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {
        "forward": lambda x: x,
        "images": torch.zeros(1, 3, 8, 8),
        "window": (8, 8),
        "base_size": 8,
    }
    arguments |= options
    with pytest.raises(InputError, match=message):
        predict(arguments.pop("forward"), arguments.pop("images"), **arguments)
