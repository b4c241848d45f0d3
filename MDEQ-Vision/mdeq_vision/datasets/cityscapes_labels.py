"""Reading Cityscapes label files as train ids.

The data set comes with label ids (0 to 33). Its own scripts convert them to train ids (0 to 18),
in files of the same kind. Only the file's name tells which: a 7 is a road as a label id, and a
traffic sign as a train id.
"""

import re
from pathlib import Path

import numpy as np

from lib.errors import InputError
from mdeq_vision.datasets.facts import CITYSCAPES
from mdeq_vision.datasets.geometry import IGNORE
from mdeq_vision.datasets.image_reading import read_labels

N_LABEL_IDS = 34
N_TRAIN_IDS = len(CITYSCAPES.class_names)
OFFICIAL = "use the files *_labelIds.png, or *_labelTrainIds.png"

# Train id or IGNORE per label id 0..33; entry 255 is label id -1 (licence plates).
TRAIN_IDS = np.full(256, IGNORE, np.uint8)
TRAIN_IDS[list(CITYSCAPES.label_ids)] = np.arange(N_TRAIN_IDS)

# Patterns for the lower-case stem of a file name. Other data sets with these classes write
# train_id.
_LABEL_IDS = re.compile(r"_labelids$")
_TRAIN_IDS = re.compile(r"(?<!instance)train_?ids?$")
_OTHER = re.compile(
    r"(?<![^_])(colou?rs?|instance_?(train_?)?ids?|polygons|disparity|(left|right)img8bit)$"
)
_SCENE = re.compile(r"(?P<scene>.+)_(leftImg8bit|gt(Fine|Coarse)_\w+)$")


def check_names(image: Path, labels: Path | None) -> None:
    """Check the names of an image and its label file (or None).

    Raises:
        InputError: the image is named like labels, the label file is named like another kind of
            file, or the names are of different scenes.
    """
    if _LABEL_IDS.search(image.stem.lower()) or _TRAIN_IDS.search(image.stem.lower()):
        raise InputError(f"{image} is named like labels, where an image is expected")
    if labels is None:
        return
    if other := _OTHER.search(labels.stem.lower()):
        raise InputError(f"{labels} ends in {other[0]}, so it holds no labels: {OFFICIAL}")
    scenes = [_SCENE.match(path.stem) for path in (image, labels)]
    if all(scenes) and len({scene["scene"] for scene in scenes}) == 2:
        raise InputError(f"{labels} are the labels of another scene than {image}")


def is_named_officially(labels: Path) -> bool:
    """Whether the name tells label ids from train ids; other files are read as label ids."""
    return bool(_LABEL_IDS.search(labels.stem.lower()) or _TRAIN_IDS.search(labels.stem.lower()))


def read_train_ids(path: Path) -> np.ndarray:
    """Read a label file as train ids or IGNORE: (H, W) uint8.

    Raises:
        InputError: ``read_labels`` refuses the file; a value is no id; or the file's palette has
            the colours of other classes, so its values only number colours.
    """
    labels, colours = read_labels(path)
    if not _TRAIN_IDS.search(path.stem.lower()):
        train_ids = to_train_ids(labels, path)
    else:
        _refuse_above(labels, N_TRAIN_IDS, path, "train id")
        train_ids = np.where(labels < 0, IGNORE, labels).astype(np.uint8)
    if colours is not None:
        check_colours(labels, train_ids, colours, CITYSCAPES.palette, path, OFFICIAL)
    return train_ids


def to_train_ids(label_ids: np.ndarray, path: Path) -> np.ndarray:
    """Convert official label ids, any integer type, to train ids or IGNORE, uint8.

    Raises:
        InputError: Cityscapes does not have an id; the message names ``path``.
    """
    _refuse_above(label_ids, N_LABEL_IDS, path, "label id")
    return TRAIN_IDS[label_ids]  # -1 indexes the last entry, 255: the same class


def check_colours(
    labels: np.ndarray,
    train_ids: np.ndarray,
    colours: np.ndarray,
    palette: tuple[tuple[int, int, int], ...],
    path: Path,
    way_out: str,
) -> None:
    """Refuse a coloured picture saved with a palette: its values number colours, not classes.

    Args:
        labels, train_ids: (H, W), as in the file, and what they stand for.
        colours: (n, 3), the file's palette.
        palette: the colours of the classes.
        path: the file, for the message; ``way_out`` is its advice.
    """
    classes = {rgb: train_id for train_id, rgb in enumerate(palette)}
    right = wrong = 0
    for label in np.unique(labels[labels < len(colours)]):
        of_colour = classes.get(tuple(colours[label].tolist()))
        if of_colour is not None:
            same = train_ids[labels == label][0] == of_colour
            right, wrong = right + same, wrong + (not same)
    # Another data set's palette may share a colour by chance.
    if wrong > max(right, 1):
        raise InputError(
            f"labels {path} have a palette with the colours of other classes, so they are a "
            f"coloured picture: {way_out}"
        )


def _refuse_above(labels: np.ndarray, n: int, path: Path, what: str) -> None:
    """Refuse labels outside -1 to n - 1. 255 is accepted: -1 (licence plates) in 8 bits."""
    unknown = (labels >= n) & (labels != 255) | (labels < -1)
    if unknown.any():
        raise InputError(
            f"labels {path} have the {what} {labels[unknown][0]}: Cityscapes has -1 to {n - 1} "
            f"({OFFICIAL})"
        )
