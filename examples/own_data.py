"""Make small data sets in the forms in which the trainers take your own: text, pictures, scenes.

    python examples/own_data.py data/own

writes

    data/own/text.txt                          English text, from the help topics of your Python
    data/own/pictures/{train,val}/CLASS/*.png  a folder of pictures per class
    data/own/scenes/images/*.png               scenes with several shapes
    data/own/scenes/labels/*.png               a value per pixel
    data/own/scenes/{train,val}.lst            lines 'image labels'
    data/own/scenes/classes.yaml               names, colours and label values of the classes

Every call writes the same files.
"""

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square")
SIDE, SCENE = 32, 64  # pixels
N_PICTURES = {"train": 60, "val": 20}  # per class
N_SCENES = {"train": 240, "val": 40}
CLASSES = """\
classes:
  - {name: background, colour: [40, 40, 40], labels: 0}
  - {name: circle, colour: [230, 25, 75], labels: 10}
  - {name: cross, colour: [60, 180, 75], labels: [20, 21]}  # two values, one class
  - {name: square, colour: [0, 110, 230], labels: 30}
ignore: [255]
"""
LABELS = {"circle": (10,), "cross": (20, 21), "square": (30,)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="written to; created if absent")
    folder = parser.parse_args(argv).folder
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(topics.values()), encoding="utf-8")
    make_pictures(folder / "pictures", rng)
    make_scenes(folder / "scenes", rng)
    print(f"{folder}: text.txt, pictures, scenes")


def make_pictures(folder: Path, rng: random.Random) -> None:
    for split, count in N_PICTURES.items():
        for shape in SHAPES:
            (folder / split / shape).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture, _ = draw(rng, SIDE, [shape])
                picture.save(folder / split / shape / f"{i:03d}.png")


def make_scenes(folder: Path, rng: random.Random) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for split, count in N_SCENES.items():
        lines = []
        for i in range(count):
            picture, labels = draw(rng, SCENE, rng.choices(SHAPES, k=3))
            for kind, image in (("images", picture), ("labels", labels)):
                image.save(folder / kind / f"{split}_{i:03d}.png")
            lines.append(f"images/{split}_{i:03d}.png labels/{split}_{i:03d}.png\n")
        (folder / f"{split}.lst").write_text("".join(lines))
    (folder / "classes.yaml").write_text(CLASSES)


def draw(rng: random.Random, size: int, shapes: list[str]) -> tuple[Image.Image, Image.Image]:
    """A picture (RGB) with bright shapes on a dark ground, and its labels (8 bits)."""
    picture = Image.new("RGB", (size, size), tuple(rng.randrange(80) for _ in range(3)))
    labels = Image.new("L", (size, size), 0)
    for shape in shapes:
        side = rng.randint(12, 20)
        left, top = (rng.randint(1, size - side - 1) for _ in range(2))
        colour = tuple(rng.randrange(140, 256) for _ in range(3))
        for image, fill in ((picture, colour), (labels, rng.choice(LABELS[shape]))):
            paint(ImageDraw.Draw(image), shape, (left, top, left + side, top + side), fill)
    return picture, labels


def paint(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], fill) -> None:
    left, top, right, bottom = box
    third = (right - left) // 3
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill=fill)
        pen.rectangle((left, top + third, right, bottom - third), fill=fill)


if __name__ == "__main__":
    main()
