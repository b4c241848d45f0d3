"""What a classifier predicts: the accuracy of each class, and a file with a line per image."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.runs.atomic_files import atomic_write


class Prediction(NamedTuple):
    """The prediction for an image: classes by number."""

    index: int  # of the image in its data set
    label: int
    predicted: int
    probability: float  # of the predicted class, as the model has it


def class_table(predictions: Iterable[Prediction], classes: Sequence[str]) -> str:
    """One line per class: its name, the share of its images that are right in percent, and their
    number; "-" for a class without images."""
    right, total = [0] * len(classes), [0] * len(classes)
    for found in predictions:
        total[found.label] += 1
        right[found.label] += found.predicted == found.label
    width = max(map(len, classes))
    return "\n".join(
        f"{name:<{width}}  " + (f"{100 * hits / n:6.2f}  of {n}" if n else f"{'-':>6}")
        for name, hits, n in zip(classes, right, total, strict=True)
    )


def write_predictions(
    path: Path, predictions: Iterable[Prediction], classes: Sequence[str], names: Sequence[str]
) -> None:
    """Write a CSV file: image, class, predicted class, and its probability; in the images' order.

    An output of the model beyond the classes is named by its number.

    Args:
        path: the file, written whole or not at all; its folder is created if absent.
        classes: the names of the classes.
        names: the names of the images.
    """
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("image", "class", "predicted", "probability"))
    for index, label, predicted, probability in sorted(predictions):
        known = predicted < len(classes)
        named = classes[predicted] if known else f"output {predicted}"
        lines.writerow((names[index], classes[label], named, f"{probability:.4f}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
