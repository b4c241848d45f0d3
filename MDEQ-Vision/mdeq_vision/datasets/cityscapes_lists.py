"""Writing the list files of a Cityscapes download."""

import re
from pathlib import Path

from lib.errors import InputError
from lib.runs.atomic_files import atomic_write
from mdeq_vision.datasets.cityscapes import FOLDER

_NAME = re.compile("[^\t\n\r\ud800-\udfff]+")  # the last are for bytes that are not UTF-8
IMAGE_ENDING, LABEL_ENDING = "_leftImg8bit.png", "_gtFine_labelIds.png"


def write_lists(root: str | Path) -> dict[Path, int]:
    """Write ROOT/list/cityscapes/{train,val,trainval,test}.lst for the images in ROOT/cityscapes.

    Each line is ``leftImg8bit/...``, a tab, and ``gtFine/...``; lines are sorted by city and name.
    test.lst has images only, because the test labels are not public; without test images it is
    not written.

    Returns:
        The path of each list and the number of its lines, in the order of writing.

    Raises:
        InputError: there are no training or validation images, an image has no labels, or a name
            cannot stand in a list. No list is written then.
    """
    folder = Path(root) / FOLDER
    lines = {split: _labelled_lines(folder, split) for split in ("train", "val")}
    lines["trainval"] = lines["train"] + lines["val"]
    test = [image.relative_to(folder).as_posix() for image in _images(folder, "test")]
    if test:
        lines["test"] = test
    target = Path(root) / "list" / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, content in lines.items():
        path = target / f"{split}.lst"
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in content).encode())
        counts[path] = len(content)
    return counts


def _images(folder: Path, split: str) -> list[Path]:
    images = sorted((folder / "leftImg8bit" / split).glob(f"*/*{IMAGE_ENDING}"))
    for image in images:
        if not _NAME.fullmatch(str(image.relative_to(folder))):
            raise InputError(
                f"the name {str(image)!r} cannot stand in a list, as it has a tab, a line end or "
                "bytes that are not UTF-8: rename it"
            )
    return images


def _labelled_lines(folder: Path, split: str) -> list[str]:
    images = _images(folder, split)
    if not images:
        raise InputError(
            f"no images {folder}/leftImg8bit/{split}/CITY/*{IMAGE_ENDING}: unpack "
            "leftImg8bit_trainvaltest.zip there (see 'bash get_data.sh cityscapes')"
        )
    labels = [
        folder
        / "gtFine"
        / split
        / image.parent.name
        / (image.name.removesuffix(IMAGE_ENDING) + LABEL_ENDING)
        for image in images
    ]
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise InputError(
            f"labels {missing[0]} do not exist ({len(missing)} of {len(labels)} in {split} are "
            "missing): unpack gtFine_trainvaltest.zip there (see 'bash get_data.sh cityscapes')"
        )
    return [
        f"{image.relative_to(folder).as_posix()}\t{label.relative_to(folder).as_posix()}"
        for image, label in zip(images, labels, strict=True)
    ]
