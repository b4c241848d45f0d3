"""The base class of the segmentation data sets: geometry, normalisation, form of an item."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lib.errors import InputError
from mdeq_vision.datasets.facts import SegmentationFacts
from mdeq_vision.datasets.geometry import IGNORE, CentreCrop, TrainingGeometry


class SegmentationDataset(Dataset):
    """Images with a train id per pixel.

    Item i is ``(image, labels)``: a normalised image, float32 (3, H, W), and labels int64 (H, W),
    train ids 0..n-1 or ``TRAIN.IGNORE_LABEL``. Items of the training splits are transformed by
    TrainingGeometry. Items of the other splits are whole images, or with TEST.CENTER_CROP_TEST
    their centres, cut out by CentreCrop. Without labels (``has_labels`` is False) every pixel is
    ignored.

    Args:
        cfg: the configuration. DATASET.NUM_CLASSES and TRAIN.IGNORE_LABEL are read; for training
            also TRAIN.IMAGE_SIZE, BASE_SIZE, SCALE_FACTOR, MULTI_SCALE, FLIP, DOWNSAMPLERATE; for
            testing TEST.CENTER_CROP_TEST, IMAGE_SIZE, BASE_SIZE.
        split: 'train', 'extra', 'valid' or 'test'.
        facts: the facts about this data set.

    Attributes:
        notes: lines for the log of a run.

    Raises:
        InputError: a setting does not fit the data set.
    """

    def __init__(self, cfg: Any, split: str, facts: SegmentationFacts):
        n_classes, ignore = len(facts.class_names), cfg.TRAIN.IGNORE_LABEL
        if n_classes != cfg.DATASET.NUM_CLASSES:
            raise InputError(
                f"DATASET.NUM_CLASSES is {cfg.DATASET.NUM_CLASSES}, but {cfg.DATASET.DATASET} "
                f"has {n_classes} classes: set it to {n_classes}"
            )
        if 0 <= ignore < n_classes:
            raise InputError(
                f"TRAIN.IGNORE_LABEL {ignore} is the class {facts.class_names[ignore]!r}: "
                "choose -1 or 255"
            )
        self.split, self.facts, self.has_labels = split, facts, True
        self.notes: list[str] = []
        self._ignore_label = ignore
        self._for_training = split in ("train", "extra")
        self._geometry = training_geometry(cfg) if self._for_training else test_geometry(cfg)
        self._mean = torch.tensor(facts.mean).view(3, 1, 1)
        self._std = torch.tensor(facts.std).view(3, 1, 1)

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of item ``index``, without suffix, for the files of its prediction."""
        raise NotImplementedError

    def _read_image(self, index: int) -> Image.Image:
        raise NotImplementedError

    def _read_train_ids(self, index: int, image: Image.Image) -> np.ndarray:
        """The labels of ``image``: (H, W) uint8, train ids or IGNORE."""
        raise NotImplementedError

    def _image_size(self, index: int) -> tuple[int, int]:
        return self._read_image(index).size

    def check_batches(self, cfg: Any) -> None:
        """Refuse batches of test images whose items differ in size.

        Raises:
            InputError: there are such; the message names the setting and the sizes.
        """
        batch, n = cfg.TEST.BATCH_SIZE_PER_GPU, len(self)
        if batch == 1:
            return
        sizes = {self._image_size(i) for i in range(min(n, cfg.TEST.NUM_SAMPLES or n))}
        if self._geometry is not None:
            sizes = {self._geometry.size(size) for size in sizes}
        if len(sizes) > 1:
            words = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
            raise InputError(
                f"TEST.BATCH_SIZE_PER_GPU is {batch}, but the images of DATASET.TEST_SET have "
                f"{len(sizes)} sizes ({words}{', ...' if len(sizes) > 3 else ''}): set it to 1"
            )

    def picture(self, index: int) -> np.ndarray:
        """The image of an evaluated item before normalisation: (H, W, 3) uint8, RGB."""
        image = self._read_image(index)
        if not self._for_training and self._geometry is not None:
            return self._geometry(image, np.zeros(image.size[::-1], np.uint8))[0]
        return np.array(image)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._read_image(index)
        if self.has_labels:
            labels = self._read_train_ids(index, image)
        else:
            labels = np.full((image.height, image.width), IGNORE, np.uint8)
        if self._geometry is not None:
            pixels, labels = self._geometry(image, labels)
        else:
            pixels = np.asarray(image)
        channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        wide = torch.from_numpy(labels.astype(np.int64))
        normalised = (channels_first.float() / 255 - self._mean) / self._std
        return normalised, wide.masked_fill_(wide == IGNORE, self._ignore_label)


def training_geometry(cfg: Any) -> TrainingGeometry:
    """The geometry that the section TRAIN describes.

    Raises:
        InputError: a setting is out of range.
    """
    train = cfg.TRAIN
    width, height = train.IMAGE_SIZE
    if min(width, height, train.BASE_SIZE) < 1:
        raise InputError(
            f"TRAIN.IMAGE_SIZE {list(train.IMAGE_SIZE)} and TRAIN.BASE_SIZE {train.BASE_SIZE}: "
            "sizes must be positive"
        )
    if train.SCALE_FACTOR < 0 or train.SCALE_FACTOR % 1:
        raise InputError(f"TRAIN.SCALE_FACTOR {train.SCALE_FACTOR}: give an integer from 0 up")
    if train.DOWNSAMPLERATE <= 0:
        raise InputError(f"TRAIN.DOWNSAMPLERATE {train.DOWNSAMPLERATE}: give a divisor above 0")
    return TrainingGeometry(
        crop=(width, height),
        base_size=train.BASE_SIZE,
        scale_factor=int(train.SCALE_FACTOR),
        multi_scale=train.MULTI_SCALE,
        flip=train.FLIP,
        label_scale=1 / train.DOWNSAMPLERATE,
    )


def test_geometry(cfg: Any) -> CentreCrop | None:
    """The geometry that the section TEST describes; None leaves images whole."""
    test = cfg.TEST
    if not test.CENTER_CROP_TEST:
        return None
    return CentreCrop(crop=tuple(test.IMAGE_SIZE), base_size=test.BASE_SIZE)


def require_unique_names(names: list[str], where: Path) -> None:
    """Refuse equal names: predictions are named after their images, and would overwrite another."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{where}: two images are named {name}: rename one")
        seen.add(name)
