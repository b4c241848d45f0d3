"""What a label file of Cityscapes holds, by its name, and its values as train ids.

The data set comes with label ids (0 to 33), from which its own scripts make train ids (0 to 18)
in files of the same kind: only the name tells them apart. A label 7 is a road or a traffic sign.
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

# In the lower-case stem of a name. Other data sets with these classes write train_id.
_LABEL_IDS = re.compile(r"_labelids$")
_TRAIN_IDS = re.compile(r"(?<!instance)train_?ids?$")
_OTHER = re.compile(
    r"(?<![^_])(colou?rs?|instance_?(train_?)?ids?|polygons|disparity|(left|right)img8bit)$"
)
_SCENE = re.compile(r"(?P<scene>.+)_(leftImg8bit|gt(Fine|Coarse)_\w+)$")


def check_names(image: Path, labels: Path | None) -> None:
    """Refuse what names alone show to be no image, no labels, or not of the same scene.

    Raises:
        InputError: see above.
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
    """Whether the name says what the values are; others are read as label ids."""
    return bool(_LABEL_IDS.search(labels.stem.lower()) or _TRAIN_IDS.search(labels.stem.lower()))


def read_train_ids(path: Path) -> np.ndarray:
    """A label file as train ids or IGNORE: (H, W) uint8.

    Raises:
        InputError: what read_labels refuses; a value that such a file does not have; or a palette
            that gives the labels the colours of other classes, so that they only count colours.
    """
    labels, colours = read_labels(path)
    if not _TRAIN_IDS.search(path.stem.lower()):
        train_ids = to_train_ids(labels, path)
    else:
        _refuse_above(labels, N_TRAIN_IDS, path, "train id")
        train_ids = np.where(labels < 0, IGNORE, labels).astype(np.uint8)
    if colours is not None:
        _check_colours(labels, train_ids, colours, path)
    return train_ids


def to_train_ids(label_ids: np.ndarray, path: Path) -> np.ndarray:
    """Official label ids, any integer type -> train ids or IGNORE, uint8.

    Raises:
        InputError: an id that Cityscapes does not have; the error names ``path``.
    """
    _refuse_above(label_ids, N_LABEL_IDS, path, "label id")
    return TRAIN_IDS[label_ids]  # -1 is the last entry, which is that of 255


def _check_colours(labels, train_ids, colours: np.ndarray, path: Path) -> None:
    """A coloured picture saved with a palette has the numbers of its colours for labels."""
    classes = {rgb: train_id for train_id, rgb in enumerate(CITYSCAPES.palette)}
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
            f"coloured picture: {OFFICIAL}"
        )


def _refuse_above(labels: np.ndarray, n: int, path: Path, what: str) -> None:
    """Labels are 0 to n - 1; id -1 (licence plates) is stored as 255 in 8 bits."""
    unknown = (labels >= n) & (labels != 255) | (labels < -1)
    if unknown.any():
        raise InputError(
            f"labels {path} have the {what} {labels[unknown][0]}: Cityscapes has -1 to {n - 1} "
            f"({OFFICIAL})"
        )


def _train_id_table() -> np.ndarray:
    """Train id or IGNORE per label id 0..33; id -1 (licence plates) is stored as 255."""
    table = np.full(256, IGNORE, np.uint8)
    table[list(CITYSCAPES.label_ids)] = np.arange(N_TRAIN_IDS)
    return table


TRAIN_IDS = _train_id_table()
