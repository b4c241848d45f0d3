"""ImageNet, or any folder with one folder of images per class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lib.errors import InputError
from mdeq_vision.datasets.image_reading import read_picture, read_rgb
from mdeq_vision.datasets.torchvision_import import LazyTransform, import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LONGEST = 16  # times as long as wide; of a longer picture the rest is far from the centre


class ImageNet(Dataset):
    """Items ``(image, label)``: a normalised image, float32 (3, size, size), and an int.

    Args:
        folder: has one folder per class; classes are numbered in the order of their names.
        size: side of the square image.
        augment: crop and resize at random, and mirror with probability 1/2. False: resize the
            shorter side to size/0.875, and cut out the centre.
        own: pictures of the user's own, read by read_picture; else by read_rgb, as published.

    Attributes:
        classes: names of the class folders.
        samples: (path, label) of each image.
        names: the path of each image, from ``folder`` on.

    Raises:
        InputError: the folder is missing, has no class folder, or has a class folder without
            images. On access: an image cannot be read.
    """

    def __init__(self, folder: Path, *, size: int, augment: bool, own: bool = False):
        if not folder.is_dir():
            raise InputError(
                f"image folder {folder} does not exist: set DATASET.ROOT, or see 'bash get_data.sh "
                "imagenet'"
            )
        try:
            found = import_torchvision().datasets.ImageFolder(str(folder))
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"image folder {folder} is not complete: {reason}") from error
        self.classes, self.samples = found.classes, found.samples
        self.names = [Path(path).relative_to(folder).as_posix() for path, _ in self.samples]
        self._read = read_picture if own else read_rgb
        self._transform = LazyTransform(_build_transform, size, augment)

    def __len__(self) -> int:
        return len(self.samples)

    def contents(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self._transform(self._read(path)), label


def imagenet_dataset(cfg: Any, split: str) -> ImageNet:
    """The images in ROOT/images/SET if there is such a folder, else in ROOT/SET.

    SET is TRAIN_SET or TEST_SET. Training images are augmented, unless AUGMENT is False.

    Raises:
        InputError: see ImageNet; MODEL.IMAGE_SIZE is not square; or the other set's folder exists
            and has other classes, so that labels would differ in meaning.
    """
    width, height = cfg.MODEL.IMAGE_SIZE
    if width != height:
        name = cfg.DATASET.DATASET
        raise InputError(f"MODEL.IMAGE_SIZE is {[width, height]}, but {name}'s are square")
    root, names = Path(cfg.DATASET.ROOT), (cfg.DATASET.TRAIN_SET, cfg.DATASET.TEST_SET)
    own, other = names if split == "train" else names[::-1]
    augment = split == "train" and cfg.DATASET.AUGMENT
    users = cfg.DATASET.DATASET == "own_pictures"
    dataset = ImageNet(_folder(root, own), size=width, augment=augment, own=users)
    other_folder = _folder(root, other)
    if other_folder.is_dir():
        other_classes = {entry.name for entry in other_folder.iterdir() if entry.is_dir()}
        odd = sorted(other_classes ^ set(dataset.classes))
        if odd:
            raise InputError(
                f"{own} and {other} in {root} must have the same class folders, but {odd[0]} is "
                f"in one only ({len(odd)} such)"
            )
    return dataset


def imagenet_input(image: Image.Image, cfg: Any) -> Tensor:
    """Make a picture the input of a model, as test images are: the square in its centre.

    Args:
        image: RGB, of any size.
        cfg: MODEL.IMAGE_SIZE is read.
    """
    short, long = sorted(image.size)
    if long > _LONGEST * short:  # resized as a whole, a line of pixels would fill the memory
        left, top = ((length - min(length, _LONGEST * short)) // 2 for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    return _build_transform(cfg.MODEL.IMAGE_SIZE[0], False)(image)


def _folder(root: Path, name: str) -> Path:
    images = root / "images" / name
    return images if images.is_dir() else root / name


def _build_transform(size: int, augment: bool):
    transforms = import_torchvision().transforms
    if augment:
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(int(size / 0.875)), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
