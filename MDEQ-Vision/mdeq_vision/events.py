"""What TensorBoard shows of an image model beside scalars: predictions, and the curves."""

import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.errors import needs
from lib.runs.figures import draw_curves
from lib.runs.run_folder import Run, read_metrics
from mdeq_vision.class_predictions import Prediction
from mdeq_vision.datasets import SegmentationDataset
from mdeq_vision.image_report import draw_scores
from mdeq_vision.pictures import overlay

SHOWN = 8  # images of a validation
_LARGEST = 256  # pixels of the longer side of one
_RIGHT, _WRONG = (47, 158, 68), (214, 51, 51)  # colours of a frame
_PAUSE = 30.0  # seconds between two drawings of the curves, which take about half a second


class ImageEvents:
    """Collects predictions of a validation, which has computed them anyway, and shows them."""

    def __init__(self):
        self._drawn = time.monotonic()
        self._found: list[Any] = []

    def begin(self) -> None:
        self._found = []

    def keep(self, *prediction: Any) -> None:
        """Keep one of the first predictions, in the form that the evaluation gives."""
        if len(self._found) < SHOWN:
            self._found.append(prediction)

    def after_validation(self, run: Run, step: int, border: int, dataset, score: str) -> None:
        """Show the predictions and, if half a minute has passed, the curves."""
        if run.folder is None:
            return
        if self._found:
            # Imported here, and below: slow, and no use of a trained model needs it.
            with needs("images"):
                from tensorboardX.summary import image
            run.show(step, image("predictions", _tiles(dataset, self._found), dataformats="HWC"))
        if time.monotonic() > self._drawn + _PAUSE:
            run.show(step, _curves(run, border, score))
            self._drawn = time.monotonic()


def _tiles(dataset, found: Sequence[tuple]) -> np.ndarray:
    """Predictions side by side, uint8 (H, W, 3).

    A scene stands above its overlay with the predicted classes. The image of a classifier has a
    green frame if the prediction is right, and a red one if it is wrong.
    """
    if isinstance(dataset, SegmentationDataset):
        tiles = []
        for index, train_ids in found:
            picture = dataset.picture(index)
            mixed = overlay(picture, train_ids.numpy(), dataset.facts.palette, None)
            tiles.append(np.concatenate([_smaller(picture), _smaller(mixed)]))
    else:
        tiles = [_framed(dataset[p.index][0].numpy(), p) for (p,) in found]
    height = max(tile.shape[0] for tile in tiles)
    filled = [np.pad(t, ((0, height - t.shape[0]), (0, 2), (0, 0))) for t in tiles]
    return np.concatenate(filled, axis=1)


def _smaller(picture: np.ndarray) -> np.ndarray:
    """Each n-th pixel, so that the longer side has at most 256."""
    every = -(-max(picture.shape[:2]) // _LARGEST)
    return picture[::every, ::every]


def _framed(pixels: np.ndarray, prediction: Prediction) -> np.ndarray:
    """A normalised image (3, H, W), from black to white, with a frame of two pixels."""
    low, high = pixels.min(), pixels.max()
    grey = (pixels - low) / max(high - low, 1e-6)
    picture = _smaller(np.rint(255 * grey).astype(np.uint8).transpose(1, 2, 0))
    right = prediction.predicted == prediction.label
    framed = np.empty((picture.shape[0] + 4, picture.shape[1] + 4, 3), np.uint8)
    framed[:] = _RIGHT if right else _WRONG
    framed[2:-2, 2:-2] = picture
    return framed


def _curves(run: Run, border: int, score: str):
    """A summary of tensorboardX."""
    with needs("images"):
        from tensorboardX.proto.summary_pb2 import Summary
    records, file = read_metrics(run.folder), io.BytesIO()
    draw_curves(records, border, file, lambda axes: draw_scores(axes, records, score))
    drawn = Summary.Image(encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag="curves", image=drawn)])
