"""Reading image files, with errors that name the file."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.errors import InputError

_ORIENTATION = 0x0112  # the EXIF tag of how the camera was held
_ON_ITS_SIDE = range(5, 9)  # its values that swap width and height
_WHITE = (255, 255, 255, 255)


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image file of a published data set as 8-bit RGB, with its pixels as they lie there.

    Grey-scale, palette, CMYK and other 8-bit images are converted. Transparency is dropped, and an
    EXIF tag of orientation is not followed: ImageNet has a few such files, and published figures
    come from readers that ignore the tag. :func:`read_picture` reads users' own files.

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


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture of the user's own as 8-bit RGB, as :func:`as_seen` makes it.

    Raises:
        InputError: the file does not exist, is no image, is truncated, or as for ``as_seen``.
    """
    return as_seen(_read(path), path)


def as_seen(image: Image.Image, name: str | Path) -> Image.Image:
    """Make an image 8-bit RGB as a person would see it.

    - It is turned upright, by its EXIF tag of orientation.
    - 16-bit grey is scaled: 65535 becomes 255.
    - What is transparent shows white.
    - Grey-scale, palette, CMYK and other 8-bit images are converted.

    Args:
        image: the first frame counts if there are several.
        name: the image's, for messages.

    Raises:
        InputError: the values have no known range (modes I and F), or cannot be converted.
    """
    image = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    # Some versions of Pillow read a 16-bit PNG with mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise InputError(f"image {name} has mode {image.mode}: save it with 8 bits a channel")
    try:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"image {name} has mode {image.mode}: save it as RGB") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF tag of orientation; 1, upright, if there is none or it cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged tags raise many kinds of error, and say nothing of the pixels
        return 1
    return found if isinstance(found, int) else 1


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


def read_size(path: str | Path, *, upright: bool = False) -> tuple[int, int]:
    """(width, height) of an image file, from its header; ``upright``: after it is turned upright.

    Raises:
        InputError: the file does not exist or is no image.
    """
    image = _read(path, load=False)
    turned = upright and _orientation(image) in _ON_ITS_SIDE
    return image.size[::-1] if turned else image.size


def _read(path: str | Path, *, load: bool = True) -> Image.Image:
    try:
        # A pipe without a writer would never end, and no decoder can seek in one.
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is not a regular file")
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
