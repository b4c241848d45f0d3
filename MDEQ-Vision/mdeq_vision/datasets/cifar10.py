"""CIFAR-10 from the Python batch files in ``DATASET.ROOT/cifar-10-batches-py``."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lib.errors import InputError
from mdeq_vision.datasets.geometry import fit_square
from mdeq_vision.datasets.torchvision_import import LazyTransform, import_torchvision

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
CLASS_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIDE = 32


class Cifar10(Dataset):
    """Items ``(image, label)``: a normalised image, float32 (3, H, W), and a label 0..9.

    Args:
        files: the batch files.
        image_size: (width, height) to which the 32x32 images are resized.
        augment: pad the image by 4, crop 32x32 at random, and mirror with probability 1/2.

    Raises:
        InputError: a file is missing or is not a CIFAR-10 batch.
    """

    def __init__(self, files: list[Path], *, image_size: tuple[int, int], augment: bool):
        batches = [read_batch(file) for file in files]
        self.images = np.concatenate([images for images, _ in batches])  # (n, 32, 32, 3) uint8
        self.labels = [label for _, labels in batches for label in labels]
        self.classes = list(CLASS_NAMES)
        self._transform = LazyTransform(_build_transform, tuple(image_size), augment)

    def __len__(self) -> int:
        return len(self.labels)

    def contents(self) -> Iterator:
        yield np.ascontiguousarray(self.images)
        yield np.array(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self.images[index])), self.labels[index]


def cifar10_dataset(cfg: Any, split: str) -> Cifar10:
    """The CIFAR-10 files below DATASET.ROOT; TRAIN_SET and TEST_SET are not used."""
    folder, is_train = Path(cfg.DATASET.ROOT) / FOLDER, split == "train"
    return Cifar10(
        [folder / name for name in (TRAIN_FILES if is_train else TEST_FILES)],
        image_size=cfg.MODEL.IMAGE_SIZE,
        augment=is_train and cfg.DATASET.AUGMENT,
    )


def cifar10_input(image: Image.Image, cfg: Any) -> Tensor:
    """Make a picture the input of a model of CIFAR-10: its centre square at 32x32, then as items.

    Args:
        image: RGB, of any size.
        cfg: MODEL.IMAGE_SIZE is read.
    """
    return _build_transform(tuple(cfg.MODEL.IMAGE_SIZE), False)(fit_square(image, SIDE))


def _build_transform(image_size: tuple[int, int], augment: bool):
    transforms = import_torchvision().transforms
    steps = []
    if augment:
        steps += [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip()]
    if image_size != (SIDE, SIDE):
        steps.append(transforms.Resize(image_size[::-1]))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Read a batch file: images (n, 32, 32, 3) uint8, and n labels.

    Raises:
        InputError: the file is missing or is not a CIFAR-10 batch.
    """
    way_out = "fetch the data with 'bash get_data.sh cifar10'"
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"CIFAR-10 file {path} does not exist: {way_out}") from None
    # A damaged pickle may raise any exception.
    except Exception as error:
        raise InputError(f"CIFAR-10 file {path} cannot be read ({error}): {way_out}") from error
    try:
        data, labels = (_entry(batch, key) for key in ("data", "labels"))
        images = np.asarray(data)
        labels = [int(label) for label in labels]
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * SIDE * SIDE):
            raise ValueError(
                f"data of type {images.dtype} and shape {images.shape} for {len(labels)} labels"
            )
        if not labels or not 0 <= min(labels) <= max(labels) < len(CLASS_NAMES):
            raise ValueError("no labels, or labels beyond 0..9")
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a CIFAR-10 batch ({error}): {way_out}") from error
    images = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _entry(batch: dict, key: str) -> Any:
    """Get an entry by its key, which is a byte string in files rewritten by Python 3."""
    return batch[key] if key in batch else batch[key.encode()]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, lists, dicts and NumPy arrays; refuses everything else.

    The published batches are pickles, and a pickle may call any function.
    """

    # Taken from __reduce__, because NumPy has moved these functions between modules.
    FUNCTIONS = {  # noqa: RUF012 - never changed
        "_reconstruct": np.empty(0).__reduce__()[0],
        "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
        "scalar": np.int64(0).__reduce__()[0],
    }
    MODULES = tuple(
        f"numpy.{core}.{module}"
        for core in ("core", "_core")
        for module in ("multiarray", "numeric")
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in self.MODULES and name in self.FUNCTIONS:
            return self.FUNCTIONS[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")
