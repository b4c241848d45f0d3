"""Images with a class per pixel that are found through list files; Cityscapes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lib.errors import InputError, naming
from mdeq_vision.datasets.cityscapes_labels import (
    check_names,
    is_named_officially,
    read_train_ids,
)
from mdeq_vision.datasets.facts import CITYSCAPES, SegmentationFacts
from mdeq_vision.datasets.image_reading import read_picture, read_rgb, read_size
from mdeq_vision.datasets.segmentation import SegmentationDataset, require_unique_names

FOLDER = "cityscapes"  # below DATASET.ROOT; list files give paths relative to it
LISTS = {"train": "TRAIN_SET", "extra": "EXTRA_TRAIN_SET", "test": "TEST_SET"}
WAY_OUT = "write the lists with 'python tools/make_cityscapes_lists.py'"


class ListedImages(SegmentationDataset):
    """The images of a list file, in the file's order. See SegmentationDataset for the items.

    The list file is DATASET.TRAIN_SET, EXTRA_TRAIN_SET or TEST_SET, relative to DATASET.ROOT. Each
    line has an image path and a label path, relative to ``folder``, with a tab or blanks between
    them. Or all lines have an image path only. Paths with blanks need the tab.

    Args:
        cfg, split, facts: as for SegmentationDataset.
        folder: the folder of the images and labels.
        way_out: how to get right lists, for messages.
        check_pair: refuses an image and its labels (or None) by their paths.

    Raises:
        InputError: the list is missing, empty or malformed; or it names a file that does not
            exist, or that ``check_pair`` refuses. On access: a file cannot be read, image and
            labels differ in size, or a label is unknown.
    """

    own = False  # True: pictures of the user's own, which are read by read_picture

    def __init__(
        self,
        cfg: Any,
        split: str,
        facts: SegmentationFacts,
        *,
        folder: Path,
        way_out: str,
        check_pair: Callable[[Path, Path | None], None] = lambda image, labels: None,
    ):
        super().__init__(cfg, split, facts)
        list_path, self._folder = Path(cfg.DATASET.ROOT) / cfg.DATASET[LISTS[split]], folder
        self.samples = read_list(list_path, folder, way_out, check_pair)
        self.has_labels = self.samples[0][1] is not None
        if split != "test" and not self.has_labels:
            raise InputError(f"{list_path} names no labels: training needs them ({way_out})")
        if split == "test":
            require_unique_names([self.name(i) for i in range(len(self))], list_path)

    def read_train_ids(self, path: Path) -> np.ndarray:
        """The labels in a file as train ids or IGNORE: (H, W) uint8."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.samples)

    def contents(self) -> Iterator[str]:
        for pair in self.samples:
            yield " ".join(path.relative_to(self._folder).as_posix() for path in pair if path)

    def name(self, index: int) -> str:
        return self.samples[index][0].stem

    def _read_image(self, index: int) -> Image.Image:
        read = read_picture if self.own else read_rgb
        return read(self.samples[index][0])

    def _image_size(self, index: int) -> tuple[int, int]:
        return read_size(self.samples[index][0], upright=self.own)

    def _read_train_ids(self, index: int, image: Image.Image) -> np.ndarray:
        image_path, label_path = self.samples[index]
        train_ids = self.read_train_ids(label_path)
        height, width = train_ids.shape
        if (width, height) != image.size:
            raise InputError(
                f"image {image_path} is {image.width}x{image.height}, but its labels {label_path} "
                f"are {width}x{height}: they must have the same size"
            )
        return train_ids


class Cityscapes(ListedImages):
    """Street scenes in ROOT/cityscapes. See ListedImages for the lists.

    Label files named *TrainIds or *train_id hold train ids, other files label ids.

    Raises:
        InputError: as ListedImages; or a file has no labels by its name, or those of another scene.
    """

    def __init__(self, cfg: Any, split: str):
        folder = Path(cfg.DATASET.ROOT) / FOLDER
        options = {"folder": folder, "way_out": WAY_OUT, "check_pair": check_names}
        super().__init__(cfg, split, CITYSCAPES, **options)
        list_path = Path(cfg.DATASET.ROOT) / cfg.DATASET[LISTS[split]]
        self.notes = _notes(list_path, [labels for _, labels in self.samples if labels])

    def read_train_ids(self, path: Path) -> np.ndarray:
        return read_train_ids(path)


def read_list(
    path: Path, folder: Path, way_out: str, check_pair: Callable[[Path, Path | None], None]
) -> list[tuple[Path, Path | None]]:
    """Read a list file: pairs (image, labels or None) of existing paths below ``folder``.

    Raises:
        InputError: see ListedImages.
    """
    try:
        # No other character ends a line: str.splitlines() would cut names with U+2028 or others.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"list file {path} cannot be read ({reason}): {way_out}") from error
    samples: list[tuple[Path, Path | None]] = []
    missing: list[tuple[int, Path]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        files = [folder / name for name in _names(line, folder)]
        if len(files) > 2:
            raise InputError(f"{path}, line {number}: expected 'image' or 'image labels': {line}")
        if samples and (samples[0][1] is None) != (len(files) == 1):
            raise InputError(f"{path}, line {number}: some lines name labels and some do not")
        missing += [(number, file) for file in files if not _is_file(file)]
        image, labels = files if len(files) == 2 else (files[0], None)
        with naming(f"{path}, line {number}"):
            check_pair(image, labels)
        samples.append((image, labels))
    if not samples:
        raise InputError(f"list file {path} is empty: {way_out}")
    if missing:
        number, file = missing[0]
        raise InputError(
            f"{path}, line {number}: {file} does not exist ({len(missing)} files of the list are "
            f"missing): check DATASET.ROOT, or {way_out}"
        )
    return samples


def _names(line: str, folder: Path) -> list[str]:
    """The paths in a line: split at tabs; else the line as a whole if that is a file; else at
    blanks."""
    if "\t" in line:
        return [name.strip() for name in line.split("\t") if name.strip()]
    whole = line.strip()
    return [whole] if _is_file(folder / whole) else whole.split()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _notes(path: Path, labels: list[Path]) -> list[str]:
    """Note it if some label files are read as label ids although their names do not say so."""
    unsaid = [file for file in labels if not is_named_officially(file)]
    if not unsaid:
        return []
    return [
        f"note: {len(unsaid)} label files of {path}, such as {unsaid[0].name}, are read as label "
        "ids: those of train ids must be named *_labelTrainIds.png"
    ]
