"""The picture of a segmentation: input, overlay, and a legend of the classes that occur."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from lib.errors import needs
from mdeq_vision.pictures import overlay

_GROWN = 256  # small pictures grow to at most this long side, by a whole factor
_LINE = (18, 60)  # smallest and largest height of a line of the legend, in pixels
_LINES = 24  # of a legend that is as high as the picture, between these two
_LONGEST = 40  # characters of an entry


def with_legend(
    picture: np.ndarray,
    train_ids: ArrayLike,
    palette: ArrayLike,
    entries: Sequence[tuple[str, Sequence[int]]],
) -> Image.Image:
    """Draw ``picture``, its overlay beside it, and a legend.

    Args:
        picture: RGB, uint8 (H, W, 3).
        train_ids, palette: as for :func:`mdeq_vision.pictures.overlay`.
        entries: a text and a colour for each line of the legend.
    """
    zoom = max(_GROWN // max(picture.shape[:2]), 1)
    grown = (zoom * picture.shape[1], zoom * picture.shape[0])
    both = [picture, overlay(picture, train_ids, palette, None)]
    left, right = (Image.fromarray(p).resize(grown, Image.Resampling.NEAREST) for p in both)
    line = min(max(left.height // _LINES, _LINE[0]), _LINE[1])
    font, gap = ImageFont.truetype(_font_file(), int(line * 0.7)), line // 3
    texts = [t if len(t) <= _LONGEST else f"{t[: _LONGEST - 1]}…" for t, _ in entries]
    width = int(max(font.getlength(text) for text in texts)) + line + 3 * gap
    height = max(left.height, line * len(entries) + 2 * gap)
    x = 2 * left.width + gap
    page = Image.new("RGB", (x + width, height), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + gap, 0))
    draw = ImageDraw.Draw(page)
    for number, (text, (_, colour)) in enumerate(zip(texts, entries, strict=True)):
        top = gap + line * number
        box = (x + gap, top + line // 8, x + gap + line, top + line - line // 8)
        draw.rectangle(box, fill=tuple(colour), outline="grey")
        draw.text((x + 2 * gap + line, top + line / 2), text, "black", font, anchor="lm")
    return page


def _font_file() -> str:
    """A font with the letters of many languages, which matplotlib brings along."""
    with needs("images"):
        import matplotlib  # imported here: most uses draw nothing

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
