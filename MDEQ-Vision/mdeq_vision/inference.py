"""Class probabilities of whole images: several scales, a sliding window, and flips."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import InputError, check


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    window: tuple[int, int],
    base_size: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Class probabilities per pixel, averaged over scales and flips; without gradients.

    For every scale s:

    1. The images are resized bilinearly (pixel centres aligned, as OpenCV does), so that their
       long side is base_size * s, rounded.
    2. If they fit in the window, one forward pass takes them whole. Otherwise windows slide over
       them with a stride of two thirds of the window, the last window flush with the border.
       Probabilities are averaged where windows overlap.
    3. ``flip`` repeats step 2 for the mirrored images and averages with the result, mirrored back.
    4. The probabilities are resized bilinearly to (H, W).

    The result is the mean over all scales.

    Args:
        forward: (B, 3, h, w) -> logits (B, n, h', w') of any resolution. The logits are resized
            bilinearly (align_corners) to (h, w) before the softmax, in float32 or wider.
        images: (B, 3, H, W), floating dtype.
        window: (width, height) of the largest input of ``forward``, in the settings' order.
        base_size: long side of the images at scale 1.
        scales: positive numbers.
        flip: average with the prediction of the mirrored images.

    Returns:
        (B, n, H, W), float32 or the logits' wider dtype. Memory holds a few tensors of this
        shape (at the largest scale) at a time, whatever the number of windows.

    Raises:
        InputError: an argument is out of range, or ``forward`` returns another shape.
    """
    size, total = images.shape[2:], None
    for probabilities in _at_scales(forward, images, window, base_size, scales, flip):
        probabilities = _resize(probabilities, size)
        total = probabilities if total is None else total.add_(probabilities)
    return total.div_(len(scales))


@torch.no_grad()
def predict_classes(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    window: tuple[int, int],
    base_size: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel, and its probability: the maximum of :func:`predict`.

    Arguments are those of ``predict``. Probabilities are resized class by class, so that large
    images need memory for a few tensors of shape (B, 1, H, W), however many classes there are.

    Returns:
        Classes (B, H, W), int64, and probabilities (B, H, W).
    """
    maps = list(_at_scales(forward, images, window, base_size, scales, flip))
    labels, best = None, None
    for number in range(maps[0].shape[1]):
        total = None
        for probabilities in maps:
            resized = _resize(probabilities[:, number, None].contiguous(), images.shape[2:])
            total = resized.clone() if total is None else total.add_(resized)
        total = total.div_(len(scales)).squeeze(1)
        if labels is None:
            labels, best = torch.zeros_like(total, dtype=torch.int64), total
        else:
            labels.masked_fill_(total > best, number)
            best = torch.maximum(best, total)
    return labels, best


def _at_scales(
    forward: Callable, images: Tensor, window, base_size: int, scales: Sequence[float], flip: bool
) -> Iterator[Tensor]:
    """Probabilities at each scale, (B, n, h, w) with the height and width of that scale."""
    _check(images, window, base_size, scales)
    for scale in scales:
        resized = _resize_images(images, _round(base_size * scale))
        probabilities = _slide(forward, resized, window)
        if flip:
            mirrored = _slide(forward, resized.flip(3), window)
            probabilities = probabilities.add_(mirrored.flip(3)).div_(2)
        yield probabilities


def _slide(forward: Callable, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Probabilities (B, n, h, w) of images (B, 3, h, w); by windows if the images are larger."""
    height, width = images.shape[2:]
    w, h = min(window[0], width), min(window[1], height)
    if (w, h) == (width, height):
        return _probabilities(forward, images)
    total, count = None, images.new_zeros(height, width, dtype=torch.int32)
    for top in _starts(height, h):
        for left in _starts(width, w):
            here = (..., slice(top, top + h), slice(left, left + w))
            part = _probabilities(forward, images[here].contiguous())
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[here] += part
            count[here] += 1
    return total.div_(count)


def _starts(size: int, window: int) -> list[int]:
    """Window starts along a side: every two thirds of a window, and one flush with the end."""
    return [*range(0, size - window, max(window * 2 // 3, 1)), size - window]


def _probabilities(forward: Callable, images: Tensor) -> Tensor:
    logits = forward(images)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"forward gave {found}, but logits ({len(images)}, n, h, w) are expected")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _resize(logits, images.shape[2:]).softmax(dim=1)


def _resize_images(images: Tensor, long_side: int) -> Tensor:
    """Resize images (B, 3, H, W) bilinearly, so that their longer side is ``long_side``."""
    long = max(images.shape[2:])
    size = [max(_round(side * long_side / long), 1) for side in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)


def _round(value: float) -> int:
    return int(value + 0.5)  # rounds halves up, as the published code does


def _check(images: Tensor, window, base_size: int, scales: Sequence[float]) -> None:
    if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape:
        raise InputError(
            f"images are {images.dtype} of shape {tuple(images.shape)}, "
            "but floating-point numbers (B, 3, H, W) are expected"
        )
    two = len(window) == 2 and min(window) >= 1
    check(two, "window", tuple(window), "(width, height) in pixels")
    check(base_size >= 1, "base_size", base_size, "at least 1 pixel")
    if not scales or min(scales) <= 0:
        raise InputError(f"scales are {tuple(scales)}, but must be one or more positive numbers")
