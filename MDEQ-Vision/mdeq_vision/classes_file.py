"""The classes of a run, in a file of its folder: what its outputs mean, when its data are gone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lib.errors import InputError
from mdeq_vision.datasets import CITYSCAPES, DIGIT_SCENES, SegmentationFacts, class_names

CLASSES = "classes.json"
_FACTS = {"digit_scenes": DIGIT_SCENES}  # whose images are normalised otherwise than Cityscapes'


def classes_of(dataset: Dataset) -> list[dict[str, Any]]:
    """A dict per class, in the order of a model's outputs.

    Each has the ``name``; for segmentation also the ``colour`` [R, G, B] and the official
    ``label``.
    """
    entries = [{"name": name} for name in class_names(dataset)]
    if facts := getattr(dataset, "facts", None):
        for entry, colour, label in zip(entries, facts.palette, facts.label_ids, strict=True):
            entry |= {"colour": list(colour), "label": label}
    return entries


def as_text(classes: Sequence[dict[str, Any]]) -> str:
    """The content of classes.json: a line per class."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in classes) + "\n]\n"


def read_classes(path: Path, *, coloured: bool) -> list[dict[str, Any]]:
    """Read a classes.json; with ``coloured`` every class must have a colour and a label.

    Raises:
        InputError: the file is damaged or has other content.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        check_classes(found, coloured=coloured)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no list of classes as training writes it: restore or delete it"
        ) from error
    return found


def check_classes(found: Any, *, coloured: bool) -> None:
    """Raise a ValueError unless ``found`` has the form of :func:`classes_of`."""
    entries = found if isinstance(found, list) else []
    whole = bool(entries) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and (not coloured or (_numbers(entry.get("colour"), 3, 255) and _label(entry)))
        for entry in entries
    )
    if not whole:
        raise ValueError("no list of classes")


def facts_of(classes: Sequence[dict[str, Any]], dataset: str) -> SegmentationFacts:
    """The facts of a segmentation's classes; images are normalised as those of ``dataset``."""
    own = _FACTS.get(dataset, CITYSCAPES)
    return SegmentationFacts(
        class_names=tuple(entry["name"] for entry in classes),
        palette=tuple(tuple(entry["colour"]) for entry in classes),
        mean=own.mean,
        std=own.std,
        class_weights=None,
        label_ids=tuple(entry["label"] for entry in classes),
    )


def _label(entry: dict) -> bool:
    return _numbers([entry.get("label")], 1, 65535)


def _numbers(value: Any, length: int, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(v) is int and 0 <= v <= most for v in value)
    )
