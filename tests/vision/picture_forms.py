"""One picture in many forms of file, each of which shows the same."""

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
# By value of the tag: how the pixels of such a file are got from the upright picture.
UNDONE = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def turned(picture: Image.Image, path: Path, tag: int = 6) -> Path:
    """Save a picture as a camera does that was not held upright: its EXIF tag says so."""
    lying = picture.transpose(UNDONE[tag])
    exif = lying.getexif()
    exif[ORIENTATION] = tag
    lying.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def grey_forms(grey: np.ndarray, folder: Path) -> dict[str, Path]:
    """Files that all show ``grey``, uint8 (H, W): by the name of the form."""
    image = Image.fromarray(grey)
    # A picture below a black layer that is transparent where the picture is white.
    alpha = np.zeros((*grey.shape, 4), np.uint8)
    alpha[..., 3] = 255 - grey
    palette = Image.fromarray(255 - grey).convert("P")  # L to P keeps the values
    palette.putpalette([255 - v for v in range(256) for _ in range(3)])
    forms = {
        "grey": (image, "png"),
        "16 bits": (Image.fromarray(grey.astype(np.uint16) * 257), "png"),
        "16 bits, TIFF": (Image.fromarray(grey.astype(np.uint16) * 257), "tif"),
        "palette": (palette, "png"),
        "RGB": (image.convert("RGB"), "png"),
        "RGBA": (Image.fromarray(alpha), "png"),
        "CMYK": (image.convert("RGB").convert("CMYK"), "tif"),
    }
    paths = {}
    for name, (form, suffix) in forms.items():
        paths[name] = folder / f"{name}.{suffix}"
        form.save(paths[name])
    paths["turned"] = turned(image, folder / "turned.png")
    return paths
