"""The image data sets: ``get_cls_dataset`` and ``get_seg_dataset``.

A new data set needs one module, and one entry in a dictionary below.
"""

from typing import Any

from torch.utils.data import Dataset

from lib.errors import InputError
from mdeq_vision.datasets.cifar10 import cifar10_dataset, cifar10_input
from mdeq_vision.datasets.cityscapes import Cityscapes
from mdeq_vision.datasets.digit_scenes import DigitScenes
from mdeq_vision.datasets.digits import digit_input, digits_dataset
from mdeq_vision.datasets.facts import CITYSCAPES, DIGIT_SCENES, SegmentationFacts
from mdeq_vision.datasets.fingerprint import fingerprint
from mdeq_vision.datasets.imagenet import imagenet_dataset, imagenet_input
from mdeq_vision.datasets.loading import make_loader, n_batches, on_device
from mdeq_vision.datasets.own_scenes import OwnScenes
from mdeq_vision.datasets.segmentation import SegmentationDataset

__all__ = [
    "CITYSCAPES",
    "CLASSIFICATION",
    "DIGIT_SCENES",
    "INPUTS",
    "NAMED_BY_FILES",
    "SEGMENTATION",
    "WITH_VALIDATION",
    "SegmentationDataset",
    "SegmentationFacts",
    "class_names",
    "fingerprint",
    "get_cls_dataset",
    "get_seg_dataset",
    "make_loader",
    "n_batches",
    "on_device",
]

# name -> function(cfg, split) -> data set
CLASSIFICATION = {
    "cifar10": cifar10_dataset,
    "imagenet": imagenet_dataset,
    "digits": digits_dataset,
    "own_pictures": imagenet_dataset,
}
# name -> function(RGB image, cfg) -> input of a model, (3, H, W), made as items of 'test' are
INPUTS = {
    "cifar10": cifar10_input,
    "imagenet": imagenet_input,
    "digits": digit_input,
    "own_pictures": imagenet_input,
}
SEGMENTATION = {
    "cityscapes": Cityscapes,
    "digit_scenes": DigitScenes,
    "own_scenes": OwnScenes,
}
# These have validation images apart from the test images. The others validate on DATASET.TEST_SET.
WITH_VALIDATION = ("digits", "digit_scenes")
# Files name the classes of these, and may change after the training.
NAMED_BY_FILES = ("imagenet", "own_pictures", "own_scenes")


def get_cls_dataset(cfg: Any, split: str) -> Dataset:
    """The 'train', 'valid' or 'test' split of DATASET.DATASET, for classification.

    The best weights of a run are chosen on 'valid'. It is the same as 'test' for a data set that is
    not in WITH_VALIDATION.

    Items are ``(image, label)``: a normalised image, float32 (3, H, W), and an int. The attribute
    ``classes`` lists the class names.

    Raises:
        InputError: the name or split is unknown, files are missing or damaged, or there are more
            classes than MODEL.NUM_CLASSES.
    """
    dataset = _build(CLASSIFICATION, cfg, split, "classification")
    n_classes = len(dataset.classes)
    if n_classes > cfg.MODEL.NUM_CLASSES:
        raise InputError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {cfg.DATASET.DATASET} has "
            f"{n_classes} classes: set it to {n_classes}"
        )
    return dataset


def get_seg_dataset(cfg: Any, split: str) -> SegmentationDataset:
    """The 'train', 'extra', 'valid' or 'test' split of DATASET.DATASET, for segmentation.

    'extra' is DATASET.EXTRA_TRAIN_SET, the data of a second stage of training. 'valid' is as in
    :func:`get_cls_dataset`.

    Raises:
        InputError: the name or split is unknown, files are missing or damaged, or settings do
            not fit the data set.
    """
    return _build(SEGMENTATION, cfg, split, "segmentation", ("train", "extra", "valid", "test"))


def _build(
    builders: dict, cfg: Any, split: str, task: str, splits: tuple = ("train", "valid", "test")
) -> Any:
    name = cfg.DATASET.DATASET
    if split not in splits:
        raise InputError(f"split {split!r}: choose {' or '.join(map(repr, splits))}")
    if name not in builders:
        raise InputError(
            f"DATASET.DATASET {name!r} is no {task} data set: choose {', '.join(builders)}"
        )
    if split == "valid" and name not in WITH_VALIDATION:
        split = "test"
    dataset = builders[name](cfg, split)
    _check_classes(cfg, class_names(dataset))
    return dataset


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes, in the order of a model's outputs."""
    found = dataset.facts.class_names if hasattr(dataset, "facts") else dataset.classes
    return list(found)


def _check_classes(cfg: Any, names: list[str]) -> None:
    """Refuse data whose classes have other numbers than DATASET.CLASSES says."""
    wanted = cfg.DATASET.CLASSES
    for number, (name, expected) in enumerate(zip(names, wanted, strict=False)):
        if name != expected:
            raise InputError(
                f"class {number} of {cfg.DATASET.DATASET} is {name!r}, but the model was trained "
                f"with {expected!r} there (DATASET.CLASSES): give the classes the names and the "
                "order of the training, or add DATASET.CLASSES [] to go on as it is"
            )
