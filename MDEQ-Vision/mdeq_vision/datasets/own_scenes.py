"""Segmentation data of the user's own: list files, and classes.yaml beside them.

    classes:                                              # train ids 0, 1, ... in this order
      - {name: sky, colour: [70, 130, 180], labels: 0}
      - {name: ground, colour: [128, 64, 128], labels: [1, 2]}
    ignore: [255, [0, 0, 0]]

``labels`` are the values of the class in label files, from 0 to 65535; by default its train id.
Label files may also be RGB pictures in the colours of the classes. ``ignore`` lists the values and
colours of pixels that do not count; by default 255, if it is no class's.
"""

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError, did_you_mean
from mdeq_vision.datasets.cityscapes import ListedImages
from mdeq_vision.datasets.cityscapes_labels import check_colours
from mdeq_vision.datasets.facts import CITYSCAPES, SegmentationFacts
from mdeq_vision.datasets.geometry import IGNORE
from mdeq_vision.datasets.image_reading import labels_of, read_label_image
from mdeq_vision.yaml_files import read_yaml

CLASSES = "classes.yaml"
MOST = IGNORE  # classes: label arrays have 8 bits, and one value is for ignored pixels
_VALUES = 2**16  # of a label file with 16 bits
_MOST_VALUES = 2 * _VALUES  # in classes.yaml: every label of every class, and more
_Colour = tuple[int, int, int]


class OwnScenes(ListedImages):
    """Images and labels anywhere below DATASET.ROOT. See ListedImages for the lists.

    classes.yaml lies beside the list DATASET.TRAIN_SET. Items are named by their path below ROOT,
    without suffix.

    Raises:
        InputError: as ListedImages; or classes.yaml is missing or wrong.
    """

    own = True

    def __init__(self, cfg: Any, split: str):
        root = Path(cfg.DATASET.ROOT)
        self.classes = read_classes((root / cfg.DATASET.TRAIN_SET).parent / CLASSES)
        way_out = "each line is 'image labels', paths below DATASET.ROOT"
        super().__init__(cfg, split, self.classes.facts, folder=root, way_out=way_out)
        self.notes = [f"classes: {', '.join(self.classes.facts.class_names)}"]
        self.class_fingerprint = self.classes.fingerprint()

    def name(self, index: int) -> str:
        path = self.samples[index][0]
        inside = path.is_relative_to(self._folder) and ".." not in path.parts
        return str(path.relative_to(self._folder).with_suffix("")) if inside else path.stem

    def read_train_ids(self, path: Path) -> np.ndarray:
        return self.classes.read(path)


@dataclass(frozen=True, eq=False)
class Classes:
    """What a classes.yaml says. Train ids are positions in its list, or IGNORE."""

    facts: SegmentationFacts
    of_label: np.ndarray  # (2**16,) int16: train id of each value in a label file, or -1
    of_colour: dict[_Colour, int]  # train id of each colour in a label picture
    path: Path

    def fingerprint(self) -> str:
        """A short text that changes with the order, the names, the labels or the colours."""
        digest = hashlib.blake2b(self.of_label.tobytes(), digest_size=6)
        digest.update(repr((self.facts.class_names, sorted(self.of_colour.items()))).encode())
        return f"{len(self.facts.class_names)} ({digest.hexdigest()})"

    def read(self, path: Path) -> np.ndarray:
        """Read a label file as train ids or IGNORE: (H, W) uint8.

        Raises:
            InputError: the file is unreadable; a value or colour is not named in classes.yaml; or
                the file's palette has the colours of other classes.
        """
        image = read_label_image(path)
        if image.mode in ("RGB", "RGBA"):
            return self._of_picture(np.array(image.convert("RGB")), path)
        if image.mode == "1":
            labels, colours = np.array(image, np.uint8), None
        else:
            labels, colours = labels_of(image, path)
        inside = (labels >= 0) & (labels < _VALUES)
        found = np.where(inside, self.of_label[np.where(inside, labels, 0)], -1)
        if (found < 0).any():
            self._refuse(path, f"label {labels[found < 0][0]}")
        train_ids = found.astype(np.uint8)
        if colours is not None:
            way_out = f"make the palette and {self.path} agree"
            check_colours(labels, train_ids, colours, self.facts.palette, path, way_out)
        return train_ids

    def _of_picture(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """The train ids of a picture (H, W, 3) in the colours of the classes."""
        numbers = pixels.astype(np.int64) @ (2**16, 2**8, 1)
        used, where = np.unique(numbers, return_inverse=True)
        colours = [(n >> 16, n >> 8 & 255, n & 255) for n in used.tolist()]
        for colour in colours:
            if colour not in self.of_colour:
                self._refuse(path, f"colour {list(colour)}")
        found = np.array([self.of_colour[colour] for colour in colours], np.uint8)
        return found[where].reshape(numbers.shape)

    def _refuse(self, path: Path, what: str) -> None:
        raise InputError(
            f"labels {path} have the {what}, which {self.path} does not name: add it to a class or "
            "to ignore"
        )


def read_classes(path: Path) -> Classes:
    """Read a classes.yaml.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown, a value is wrong, or two
            classes share a name, a colour or a label.
    """
    content = _mapping(_load(path), ("classes", "ignore"), str(path))
    entries = content.get("classes")
    fits = isinstance(entries, list) and 1 <= len(entries) <= MOST
    _need(fits, f"{path}: classes", entries, f"a list of 1 to {MOST} classes")
    names: dict[str, int] = {}
    of_label: dict[int, int] = {}
    of_colour: dict[_Colour, int] = {}
    label_ids = []
    for number, entry in enumerate(entries):
        where = f"{path}, class {number}"
        entry = _mapping(entry, ("name", "colour", "labels"), where)
        name, colour = entry.get("name"), entry.get("colour")
        named = isinstance(name, (str, int)) and not isinstance(name, bool) and _is_word(str(name))
        _need(
            named,
            f"{where}: name",
            name,
            "text of one line without blanks around it, in quotes if YAML takes it for something "
            "else",
        )
        _need(_is_colour(colour), f"{where}: colour", colour, "three numbers from 0 to 255")
        labels = entry.get("labels", number)
        labels = labels if isinstance(labels, list) else [labels]
        fits = labels and all(_is_label(label) for label in labels)
        _need(fits, f"{where}: labels", labels, f"numbers from 0 to {_VALUES - 1}")
        _give(names, str(name), number, where)
        _give(of_colour, tuple(colour), number, where)
        for label in labels:
            _give(of_label, label, number, where)
        label_ids.append(labels[0])
    ignored = content.get("ignore", [255] if 255 not in of_label else [])
    for value in ignored if isinstance(ignored, list) else [ignored]:
        fits = _is_label(value) or _is_colour(value)
        _need(fits, f"{path}: ignore", ignored, "a list of labels, or of colours [R, G, B]")
        if _is_colour(value):
            _give(of_colour, tuple(value), IGNORE, f"{path}: ignore")
        else:
            _give(of_label, value, IGNORE, f"{path}: ignore")
    facts = SegmentationFacts(
        class_names=tuple(names),
        palette=tuple(colour for colour, train_id in of_colour.items() if train_id != IGNORE),
        mean=CITYSCAPES.mean,
        std=CITYSCAPES.std,
        class_weights=None,
        label_ids=tuple(label_ids),
    )
    table = np.full(_VALUES, -1, np.int16)
    table[list(of_label)] = list(of_label.values())
    return Classes(facts, table, of_colour, path)


def _load(path: Path) -> Any:
    try:
        return read_yaml(path, most=_MOST_VALUES)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): write the classes into it, with names and "
            "colours"
        ) from error


def _mapping(value: Any, known: tuple[str, ...], where: str) -> Mapping:
    _need(isinstance(value, Mapping), where, value, f"the keys {', '.join(known)} with values")
    for key in value:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    return value


def _need(fits: Any, what: str, value: Any, accepted: str) -> None:
    if not fits:  # the value may be huge, or contain itself
        raise InputError(f"{what} is {reprlib.repr(value)}, but must be {accepted}")


def _is_label(value: Any, below: int = _VALUES) -> bool:
    return type(value) is int and 0 <= value < below


def _is_word(text: str) -> bool:
    return text.isprintable() and text != "" and text == text.strip()


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_label(v, 256) for v in value)


def _give(table: dict, key: Any, train_id: int, where: str) -> None:
    if key in table:
        raise InputError(f"{where}: {key!r} stands twice in the file")
    table[key] = train_id
