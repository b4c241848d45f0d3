"""Draw how a path finds itself: the prediction after more and more evaluations of f.

Orange is the chance that a cell is on the path. A cell is pale blue when it has heard of an end:
when it hears something else than in the same maze without ends.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mazes import PathFinder, heard

FRAMES = 60  # of the animation, at equal distances
STRIP = (0, 4, 16, 64, 256)  # evaluations; the last state follows
TOLERANCE = 1e-3
WHITE, REACHED, ON_PATH, WALL, END = np.array(
    [(255, 255, 255), (208, 228, 244), (230, 120, 20), (60, 60, 60), (0, 90, 170)]
)
MILLISECONDS, PAUSE = 90, 3000  # of a frame; of the last one


class Moment(NamedTuple):
    """The state after so many evaluations of f."""

    evaluations: int
    residual: float
    chance: Tensor  # that a cell is on the path (n, n)
    reached: Tensor  # whether a cell has heard of an end (n, n)


@torch.no_grad()
def moments(model: PathFinder, sides: Tensor, ends: Tensor) -> list[Moment]:
    """The moments of one maze, from the start to a relative residual of the tolerance."""
    sides, ends = sides.expand(2, -1, -1, -1, -1), torch.cat([ends, 0 * ends])
    f, z, found = model.layer(sides, ends), model.start(sides), []
    for evaluations in range(ends[0, ..., 0].numel() + 2):
        after = f(z)
        residual = ((after - z)[0].norm() / after[0].norm()).item()
        chance = torch.sigmoid(model.read(z, sides, ends))[0]
        told, otherwise = heard(z, sides)
        reached = (told - otherwise).norm(dim=(0, -1)) > 0.01 * told.norm(dim=(0, -1))
        found.append(Moment(evaluations, residual, chance, reached))
        if residual <= TOLERANCE:
            break
        z = after
    return found


def paint(moment: Moment, sides: Tensor, ends: Tensor, pixels: int) -> Image.Image:
    """One maze at one moment; a cell has ``pixels`` x ``pixels``."""
    n, margin = len(moment.chance), pixels
    chance = (16 * moment.chance).round().numpy()[..., None] / 16  # few colours: a small file
    colours = np.where(moment.reached[..., None], REACHED, WHITE)
    colours = (colours + chance * (ON_PATH - colours)).astype(np.uint8)
    image = Image.new("RGB", (n * pixels + 2 * margin, (n + 2) * pixels + 2 * margin), "white")
    cells = colours.repeat(pixels, 0).repeat(pixels, 1)
    image.paste(Image.fromarray(cells), (margin, margin))
    pen = ImageDraw.Draw(image)
    closed = (sides[0, ..., 0] == 0).numpy()
    for d, (a, b) in enumerate(
        (((0, 0), (1, 0)), ((1, 0), (1, 1)), ((0, 1), (1, 1)), ((0, 0), (0, 1)))
    ):
        for y, x in np.argwhere(closed[d]):
            line = [(margin + (x + u) * pixels, margin + (y + v) * pixels) for u, v in (a, b)]
            pen.line(line, fill=tuple(WALL))
    for y, x, _ in ends[0].nonzero().tolist():
        middle = margin + (x + 0.5) * pixels, margin + (y + 0.5) * pixels
        pen.circle(middle, 0.4 * pixels, fill=tuple(END))
    text = f"evaluations {moment.evaluations}   residual {moment.residual:.0e}"
    at = margin, (n + 0.4) * pixels + margin
    pen.text(at, text, fill=tuple(WALL), font=ImageFont.load_default(1.7 * pixels))
    return image


def draw(model: PathFinder, sides: Tensor, ends: Tensor, name: Path) -> None:
    """Write the animation NAME.gif and the strip NAME.png of one maze (sides and ends: B = 1)."""
    found = moments(model, sides, ends)
    last = len(found) - 1
    film = [
        paint(found[round(i)], sides, ends, 10)
        for i in np.linspace(0, last, min(FRAMES, len(found)))
    ]
    film = [image.quantize(64) for image in film]
    film[0].save(
        name.with_suffix(".gif"), save_all=True, append_images=film[1:], loop=0,
        duration=[MILLISECONDS] * (len(film) - 1) + [PAUSE],
    )  # fmt: skip
    strip = [paint(found[i], sides, ends, 7) for i in (*(i for i in STRIP if i < last), last)]
    wide = Image.new("RGB", (sum(image.width for image in strip), strip[0].height), "white")
    for i, image in enumerate(strip):
        wide.paste(image, (i * image.width, 0))
    wide.quantize(64).save(name.with_suffix(".png"), optimize=True)
