"""Reading image files, with errors that name the file."""

from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import InputError


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grey-scale, palette, CMYK and other 8-bit images are converted; transparency is dropped.

    Raises:
        InputError: the file does not exist, is no image or is truncated, or has more than 8 bits
            per channel.
    """
    image = _read(path)
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip these values to white.
        raise InputError(f"image {path} has mode {image.mode}: save it with 8 bits a channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the labels (H, W) of a file in its own integer type, and its palette.

    The palette is the colours (n, 3) uint8 of the labels 0 to n - 1, or None.

    Raises:
        InputError: the file does not exist, is no image, is truncated, has several channels, or
            has a lossy format.
    """
    return labels_of(read_label_image(path), path)


def labels_of(image: Image.Image, path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels and the palette of an image that was read from ``path``; as ``read_labels``."""
    labels = np.array(image)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"label image {path} has shape {labels.shape} and type {labels.dtype}: one integer "
            "per pixel is expected (*_labelIds.png, not the coloured image)"
        )
    colours = image.getpalette("RGB") if image.mode == "P" else None
    return labels, None if colours is None else np.array(colours, np.uint8).reshape(-1, 3)


def read_label_image(path: str | Path) -> Image.Image:
    """Read an image file of labels.

    Raises:
        InputError: the file does not exist, is no image, is truncated, or has a lossy format.
    """
    image = _read(path)
    if image.format in ("JPEG", "JPEG2000"):
        raise InputError(f"label image {path} is a {image.format}, which changes values: use PNG")
    return image


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header.

    Raises:
        InputError: the file does not exist or is no image.
    """
    return _read(path, load=False).size


def _read(path: str | Path, *, load: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            if load:
                image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    # For a damaged file, decoders raise many kinds of error: OSError, SyntaxError, struct.error,
    # EOFError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path} cannot be read ({reason}): replace the file") from error
