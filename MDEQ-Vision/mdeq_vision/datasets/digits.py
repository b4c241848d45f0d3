"""The handwritten digits of scikit-learn: 1797 images of 8x8 pixels, no download."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lib.errors import needs
from mdeq_vision.datasets.geometry import fit_square

MEAN, STD = 0.3, 0.31  # of resized images with pixels in [0, 1]
HELD_OUT = {"test": 0.2, "valid": 0.1}  # shares of each class; in this order
SPLIT_SEED = 0
# Largest random changes of a training image: shift in pixels of the 8x8 image, turn in degrees,
# and the factor by which it grows or shrinks.
MAX_SHIFT, MAX_TURN, MAX_ZOOM = 0.75, 8.0, 1.1
SIDE = 8


class Digits(NamedTuple):
    """Read-only arrays: images (n, 8, 8) float32 in [0, 1], ink is 1; labels (n,) int64."""

    images: np.ndarray
    labels: np.ndarray


@functools.lru_cache(maxsize=1)
def split_digits() -> dict[str, Digits]:
    """The digits in fixed splits, 'train' (70 %), 'test' and 'valid'; each has every class."""
    with needs("images"):
        from sklearn.datasets import load_digits  # imported here: it takes a second

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, SIDE, SIDE) / 16).astype(np.float32)
    rng = np.random.default_rng(SPLIT_SEED)
    of_split = np.full(len(labels), "train", dtype=object)
    for label in range(10):
        left = rng.permutation(np.flatnonzero(labels == label))
        counts = {name: round(share * len(left)) for name, share in HELD_OUT.items()}
        for name, count in counts.items():
            of_split[left[:count]], left = name, left[count:]
    splits = {}
    for name in ("train", *HELD_OUT):
        chosen = of_split == name
        splits[name] = Digits(images[chosen], labels[chosen].astype(np.int64))
        for array in splits[name]:
            array.flags.writeable = False  # one copy for all callers
    return splits


class DigitImages(Dataset):
    """Items ``(image, label)``: a normalised grey image, float32 (3, H, W), and a label 0..9.

    Args:
        split: 'train', 'valid' or 'test'.
        image_size: (width, height) to which the 8x8 image is resized bilinearly.
        augment: shift, turn and zoom the image at random.
    """

    def __init__(self, split: str, *, image_size: tuple[int, int], augment: bool):
        digits = split_digits()[split]
        self.images = torch.tensor(digits.images)[:, None]  # (n, 1, 8, 8)
        self.labels = digits.labels.tolist()
        self.classes = [str(digit) for digit in range(10)]
        self._size, self._augment = tuple(image_size), augment

    def __len__(self) -> int:
        return len(self.labels)

    def contents(self) -> Iterator:
        yield self.images.numpy()
        yield np.array(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        affine = _random_affine() if self._augment else torch.eye(2, 3)
        return _item(self.images[index], affine, self._size), self.labels[index]


def _item(image: Tensor, affine: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (1, 8, 8) at ``size`` (width, height), normalised: (3, H, W)."""
    width, height = size
    grid = F.affine_grid(affine[None], (1, 1, height, width), align_corners=False)
    # Pixels from outside of the image are 0, the background.
    image = F.grid_sample(image[None], grid, align_corners=False)  # (1, 1, H, W)
    return ((image[0] - MEAN) / STD).repeat(3, 1, 1)


def _random_affine() -> Tensor:
    """A random map (2, 3) from output to input coordinates; both run from -1 to 1."""
    turn, zoom, *shift = (2 * torch.rand(4) - 1).tolist()
    turn *= math.radians(MAX_TURN)
    zoom = MAX_ZOOM**zoom
    cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
    x, y = (2 / SIDE * MAX_SHIFT * s for s in shift)
    return torch.tensor([[cos, -sin, x], [sin, cos, y]])


def digits_dataset(cfg: Any, split: str) -> DigitImages:
    """A split of the digits at MODEL.IMAGE_SIZE; DATASET.ROOT is not used."""
    augment = split == "train" and cfg.DATASET.AUGMENT
    return DigitImages(split, image_size=cfg.MODEL.IMAGE_SIZE, augment=augment)


def digit_input(image: Image.Image, cfg: Any) -> Tensor:
    """Make a picture the input of a model of digits, (3, H, W), as items are made.

    Grey values become ink, white the most, as on a blackboard; the centre square shrinks to 8x8.
    """
    grey = fit_square(image.convert("L").convert("F"), SIDE)
    ink = torch.from_numpy(np.array(grey, np.float32) / 255)
    return _item(ink[None], torch.eye(2, 3), tuple(cfg.MODEL.IMAGE_SIZE))
