"""The handwritten digits of scikit-learn: 1797 images of 8x8 pixels, no download."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

MEAN, STD = 0.3, 0.31  # of the resized pixels, in [0, 1]
TEST_SHARE = 0.2
SPLIT_SEED = 0
# Random changes of a training image: shift by up to so many pixels of the 8x8 image, turn by up
# to so many degrees, larger or smaller by up to this factor.
MAX_SHIFT, MAX_TURN, MAX_ZOOM = 0.75, 8.0, 1.1
SIDE = 8


class Digits(NamedTuple):
    """images: (n, 8, 8) float32 in [0, 1], ink is 1; labels: (n,) int64. Both read-only."""

    images: np.ndarray
    labels: np.ndarray


@functools.lru_cache(maxsize=1)
def split_digits() -> dict[str, Digits]:
    """The digits under 'train' (about 80 %) and 'test': always the same, every class in both."""
    from sklearn.datasets import load_digits  # imported where used: it takes a second

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, SIDE, SIDE) / 16).astype(np.float32)
    rng = np.random.default_rng(SPLIT_SEED)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        of_class = np.flatnonzero(labels == label)
        is_test[rng.permutation(of_class)[: round(TEST_SHARE * len(of_class))]] = True
    splits = {}
    for name, chosen in (("train", ~is_test), ("test", is_test)):
        splits[name] = Digits(images[chosen], labels[chosen].astype(np.int64))
        for array in splits[name]:
            array.flags.writeable = False  # one copy for all callers
    return splits


class DigitImages(Dataset):
    """Items ``(image, label)``: image float32 (3, H, W), normalised, channels equal; label 0..9.

    Args:
        split: 'train' or 'test'.
        image_size: (width, height) to which the 8x8 image is resized bilinearly.
        augment: shift, turn and zoom the image a little, at random.

    Attributes:
        classes: "0" to "9".
    """

    def __init__(self, split: str, *, image_size: tuple[int, int], augment: bool):
        digits = split_digits()[split]
        self.images = torch.tensor(digits.images)[:, None]  # (n, 1, 8, 8)
        self.labels = digits.labels.tolist()
        self.classes = [str(digit) for digit in range(10)]
        self._size, self._augment = tuple(image_size), augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # The image lies on black paper, from which moved images are filled up.
        affine = _random_affine() if self._augment else torch.eye(2, 3)
        width, height = self._size
        grid = F.affine_grid(affine[None], (1, 1, height, width), align_corners=False)
        image = F.grid_sample(self.images[index, None], grid, align_corners=False)  # (1, 1, H, W)
        return ((image[0] - MEAN) / STD).repeat(3, 1, 1), self.labels[index]


def _random_affine() -> Tensor:
    """(2, 3), from output to input coordinates, which run from -1 to 1."""
    turn, zoom, *shift = (2 * torch.rand(4) - 1).tolist()
    turn *= math.radians(MAX_TURN)
    zoom = MAX_ZOOM**zoom
    cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
    x, y = (2 / SIDE * MAX_SHIFT * s for s in shift)
    return torch.tensor([[cos, -sin, x], [sin, cos, y]])


def digits_dataset(cfg: Any, split: str) -> DigitImages:
    """The digits at MODEL.IMAGE_SIZE; DATASET.ROOT is not used."""
    augment = split == "train" and cfg.DATASET.AUGMENT
    return DigitImages(split, image_size=cfg.MODEL.IMAGE_SIZE, augment=augment)
