"""Scenes of several handwritten digits with a class per pixel, no download.

Digits of scikit-learn have varying size, place and colour on a varying background. Digit d is
class d + 1; background is class 0. Scene i of a split is a pure function of the split, i and the
size. The scenes of a split contain digits of this split only.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from lib.errors import InputError
from mdeq_vision.datasets.digits import split_digits
from mdeq_vision.datasets.facts import DIGIT_SCENES
from mdeq_vision.datasets.segmentation import SegmentationDataset

N_SCENES = {"train": 1000, "test": 200, "valid": 100}  # a split's place here is part of its seed
SEED = 2024
N_DIGITS = (3, 6)  # fewest and most digits in a scene; fewer if there is no room
# Smallest and largest side of a digit's square, relative to the scene's shorter side. The square
# has a margin, so the digit takes 4/5 of the side: 14 to 30 pixels of 64.
DIGIT_SIDE = (0.28, 0.58)
MARGIN = 1  # pixels around the 8x8 of a digit, because most digits reach the edge
MIN_SIDE = 32  # of a scene; in smaller scenes the smallest digits are unreadable
INK = 0.45  # pixels darker than this belong to the digit's class
SOFTNESS = 0.15  # ink fades into background at a darkness of INK +- SOFTNESS
OVERLAP = 0.15  # largest overlap of two squares, relative to the smaller square
ATTEMPTS = 30  # tries to place a digit, then again at the smallest size; then it is left out


class DigitScenes(SegmentationDataset):
    """Scenes of size TRAIN.IMAGE_SIZE (width, height). See SegmentationDataset for the items.

    A scene is rendered when it is first read, then kept. DATASET.ROOT is not used.

    Raises:
        InputError: scenes are smaller than 32 pixels, or a setting does not fit.
    """

    def __init__(self, cfg: Any, split: str):
        super().__init__(cfg, split, DIGIT_SCENES)
        if split not in N_SCENES:
            raise InputError("digit_scenes has no lists, so DATASET.EXTRA_TRAIN_SET names nothing")
        width, height = cfg.TRAIN.IMAGE_SIZE
        if min(width, height) < MIN_SIDE:
            raise InputError(
                f"TRAIN.IMAGE_SIZE {[width, height]}: digit scenes need at least "
                f"{MIN_SIDE}x{MIN_SIDE} pixels"
            )
        self._size = width, height
        self._scenes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return N_SCENES[self.split]

    def name(self, index: int) -> str:
        return f"{self.split}_{index:04d}"

    def _scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._scenes:
            self._scenes[index] = render_scene(self.split, index, self._size)
        return self._scenes[index]

    def _read_image(self, index: int) -> Image.Image:
        return Image.fromarray(self._scene(index)[0])

    def _image_size(self, index: int) -> tuple[int, int]:
        return self._size

    def _read_train_ids(self, index: int, image: Image.Image) -> np.ndarray:
        return self._scene(index)[1]


@dataclass(frozen=True)
class _Ink:
    """A digit of a scene: its darkness (side, side), class, colour, and its place (x, y)."""

    darkness: np.ndarray
    label: int
    colour: tuple[float, float, float]
    place: tuple[float, float]


def render_scene(split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Render scene ``index`` of a split at ``size`` (width, height).

    Returns:
        Image (H, W, 3) uint8 and labels (H, W) uint8, 0 for background and d + 1 for digit d.
    """
    background, inks, _ = _contents(split, index, size)
    return _compose(background, inks)


def render_film(
    split: str, index: int, size: tuple[int, int], frames: int, speed: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Render scene ``index`` of a split as a film: its digits move, its background rests.

    The first frame is the scene of :func:`render_scene`. Each digit moves in a direction of its
    own by ``speed`` pixels a frame, and turns back at the borders.

    Yields:
        Image and labels of each frame, as :func:`render_scene` returns them.
    """
    background, inks, rng = _contents(split, index, size)
    angles = rng.uniform(0, 2 * np.pi, len(inks))
    steps = speed * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = np.array([ink.place for ink in inks], dtype=np.float64)
    room = np.array([[length - len(ink.darkness) for length in size] for ink in inks])
    for _ in range(frames):
        yield _compose(
            background,
            [replace(ink, place=tuple(place)) for ink, place in zip(inks, places, strict=True)],
        )
        places = places + steps
        steps = np.where((places < 0) | (places > room), -steps, steps)
        places = places.clip(0, room)


def _contents(
    split: str, index: int, size: tuple[int, int]
) -> tuple[np.ndarray, list[_Ink], np.random.Generator]:
    """Background (H, W, 3) and digits of a scene, and the generator that drew them."""
    rng = np.random.default_rng((SEED, list(N_SCENES).index(split), index))
    digits = split_digits()[split]
    background = _background(rng, *size)
    smallest, largest = (round(share * min(size)) for share in DIGIT_SIDE)
    # Place large digits first, while there is room.
    sides = np.sort(rng.integers(smallest, largest + 1, rng.integers(N_DIGITS[0], N_DIGITS[1] + 1)))
    boxes: list[tuple[int, int, int]] = []
    inks = []
    for side in sides[::-1].tolist():
        place = _find_place(rng, size, side, boxes) or _find_place(rng, size, smallest, boxes)
        if place is None:
            continue
        boxes.append(place)
        left, top, side = place
        which = rng.integers(len(digits.labels))
        darkness = _enlarge(digits.images[which], side)
        inks.append(_Ink(darkness, digits.labels[which] + 1, _ink_colour(rng), (left, top)))
    return background, inks, rng


def _compose(background: np.ndarray, inks: list[_Ink]) -> tuple[np.ndarray, np.ndarray]:
    """Draw digits (the later ones in front) on a background (H, W, 3) in [0, 1]."""
    image, labels = background.copy(), np.zeros(background.shape[:2], np.uint8)
    for ink in inks:
        left, top = (int(place) for place in ink.place)
        darkness = _shifted(ink.darkness, ink.place[0] - left, ink.place[1] - top)
        cover = np.clip((darkness - INK) / (2 * SOFTNESS) + 0.5, 0, 1)[..., None]
        window = (slice(top, top + len(darkness)), slice(left, left + len(darkness)))
        image[window] = cover * ink.colour + (1 - cover) * image[window]
        labels[window][darkness > INK] = ink.label
    return (image * 255 + 0.5).astype(np.uint8), labels


def _shifted(darkness: np.ndarray, x: float, y: float) -> np.ndarray:
    """Move (side, side) to the right and down by less than a pixel; its margin has no ink."""
    if x == y == 0:
        return darkness
    image = Image.fromarray(darkness)
    shift = (1, 0, -x, 0, 1, -y)
    return np.asarray(
        image.transform(image.size, Image.Transform.AFFINE, shift, Image.Resampling.BICUBIC)
    )


def _enlarge(digit: np.ndarray, side: int) -> np.ndarray:
    """Resize (8, 8) to (side, side) with a margin. Bicubic: bilinear would show the pixels."""
    image = Image.fromarray(np.pad(digit, MARGIN))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _find_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    side: int,
    boxes: list[tuple[int, int, int]],
) -> tuple[int, int, int] | None:
    """Find a square (left, top, side) that overlaps others by at most OVERLAP, or None."""
    for _ in range(ATTEMPTS):
        left, top = (int(rng.integers(0, length - side + 1)) for length in size)
        if all(
            _shared(left, side, x, other) * _shared(top, side, y, other)
            <= OVERLAP * min(side, other) ** 2
            for x, y, other in boxes
        ):
            return left, top, side
    return None


def _shared(a: int, a_length: int, b: int, b_length: int) -> int:
    return max(0, min(a + a_length, b + b_length) - max(a, b))


def _ink_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    """A bright colour of any hue: ink is always brighter than the background."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.45), rng.uniform(0.75, 1.0))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A dark background (H, W, 3) in [0, 1]: a gradient or stripes of two colours, plus noise."""
    first, second = (
        np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.8), rng.uniform(0.05, 0.4)))
        for _ in range(2)
    )
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if rng.uniform() < 0.5:
        mix = (along - along.min()) / np.ptp(along)
    else:
        period = rng.uniform(6, 20)
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * along / period)
    mix = mix[..., None]
    noise = rng.normal(0, rng.uniform(0, 0.06), (height, width, 1))
    return np.clip(mix * first + (1 - mix) * second + noise, 0, 1)
