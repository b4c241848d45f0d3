"""Scale, crop and flip an image together with its labels.

All randomness comes from torch's global generator.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

IGNORE = 255  # marks ignored pixels in uint8 label arrays; items have TRAIN.IGNORE_LABEL instead


@dataclass(frozen=True)
class TrainingGeometry:
    """Transforms a training image and its labels with the same random numbers.

    1. With ``multi_scale``, resize to the long side ``base_size * (0.5 + k/10)``, k uniform in
       0..scale_factor: the image bilinearly, the labels by nearest neighbour.
    2. Cut out a random window of size ``crop`` (width, height). A smaller image is padded at the
       right and at the bottom: the image with 0, the labels with IGNORE.
    3. With ``flip``, mirror left to right with probability 1/2.
    4. Resize the labels by the factor ``label_scale``, by nearest neighbour.
    """

    crop: tuple[int, int]
    base_size: int
    scale_factor: int
    multi_scale: bool
    flip: bool
    label_scale: float = 1.0

    def __call__(self, image: Image.Image, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels (h, w) uint8 -> (H, W, 3) and (label_scale * (H, W)), both uint8."""
        size = self._scaled_size(image.size)
        # ``seen``: the size of the part of the scaled image inside the window. resize() computes
        # only this part, from ``box`` in the source image.
        seen = tuple(min(full, window) for full, window in zip(size, self.crop, strict=True))
        left, top = (_random_below(full - part + 1) for full, part in zip(size, seen, strict=True))
        x, y = image.width / size[0], image.height / size[1]
        box = (left * x, top * y, (left + seen[0]) * x, (top + seen[1]) * y)
        # The far corner may leave the image by a rounding error, which resize() refuses.
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        pixels = np.asarray(image.resize(seen, Image.Resampling.BILINEAR, box))
        labels = _nearest(labels, seen, box)
        right, bottom = self.crop[0] - seen[0], self.crop[1] - seen[1]
        pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)))
        labels = np.pad(labels, ((0, bottom), (0, right)), constant_values=IGNORE)
        if self.flip and _random_below(2):
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        return pixels, resize_labels(labels, self.label_scale)

    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if not self.multi_scale:
            return size
        scale = 0.5 + _random_below(self.scale_factor + 1) / 10
        return _with_long_side(size, int(self.base_size * scale + 0.5))


@dataclass(frozen=True)
class CentreCrop:
    """Cuts out the centre of a test image and of its labels at scale 1.

    First both are resized to the long side ``base_size``: the image bilinearly as in
    :mod:`mdeq_vision.inference`, the labels by nearest neighbour. Then ``crop`` (width, height) is
    cut out of the middle. A side smaller than the crop stays whole.
    """

    crop: tuple[int, int]
    base_size: int

    def __call__(self, image: Image.Image, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels (h, w) uint8 -> (H, W, 3) and (H, W), both uint8."""
        pixels = np.asarray(image)
        width, height = _with_long_side(image.size, self.base_size)
        if (width, height) != image.size:
            channels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
            channels = F.interpolate(channels, (height, width), mode="bilinear")
            pixels = channels[0].permute(1, 2, 0).round().byte().numpy()
            labels = _nearest(labels, (width, height))
        left, top = (
            max(round((side - crop) / 2), 0)
            for side, crop in zip((width, height), self.crop, strict=True)
        )
        window = (slice(top, top + self.crop[1]), slice(left, left + self.crop[0]))
        return pixels[window], labels[window]

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of what is cut out of an image of ``size``."""
        width, height = _with_long_side(size, self.base_size)
        return min(width, self.crop[0]), min(height, self.crop[1])


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """The centre square of an image, resized bilinearly to ``side``; of that size already, as is.

    Where it shrinks, each pixel is a mean over those that it stands for.
    """
    if image.size == (side, side):
        return image
    short = min(image.size)
    left, top = ((length - short) / 2 for length in image.size)
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.BILINEAR, box)


def resize_labels(labels: np.ndarray, factor: float) -> np.ndarray:
    """Resize labels (H, W) uint8 to (H * factor, W * factor) by nearest neighbour."""
    if factor == 1:
        return labels
    height, width = (max(1, int(side * factor + 0.5)) for side in labels.shape)
    return _nearest(labels, (width, height))


def _nearest(labels: np.ndarray, size: tuple[int, int], box=None) -> np.ndarray:
    """The part ``box`` of labels, at ``size`` (width, height)."""
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box))


def _with_long_side(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    width, height = (max(1, int(side * long_side / max(size) + 0.5)) for side in size)
    return width, height


def _random_below(n: int) -> int:
    return int(torch.randint(n, ()))
