"""Segmentation of films: each solve from the equilibrium of the frame before, or from zeros.

    python scripts/benchmarks/bench_film.py --json docs/data/film.json

Test scenes of digit_scenes become films: each digit moves by --speed pixels a frame. The films
follow one another, so that each begins with a cut. All ways see the same frames, in turns.
"Changed" is the share of pixels with another label than the solve from zeros to the tolerance
gives. On the CPU there is one thread, and its own time counts, so that other processes matter less.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, synchronize, table
from PIL import Image

import mdeq_vision
from lib.runs.command_line import exit_code
from mdeq_vision.datasets.digit_scenes import N_SCENES, render_film
from mdeq_vision.metrics import ConfusionMatrix
from mdeq_vision.prediction.predictors import Segmentation, TrainedSegmenter

SCENES = Path(__file__).resolve().parents[2] / "docs/models/scenes.safetensors"
WHOLE = "from zeros, to the tolerance"
Frame = tuple[Image.Image, np.ndarray]  # and its labels


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_film.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    least = {"films": 1, "frames": 2}
    parser = Parser(prog="bench_film.py", description=__doc__.splitlines()[0], least=least)
    add = parser.add_argument
    add("--model", type=Path, default=SCENES, help="a run's folder, or an exported file")
    add("--films", type=int, default=20, help=f"test scenes, of {N_SCENES['test']}")
    add("--frames", type=int, default=24, help="of each film")
    add("--speed", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="pixels a frame")
    add("--f_thres", type=int, nargs="+", default=[1, 2, 3], help="thresholds of the solver")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    trained = mdeq_vision.load(options.model, options.device)
    rows = []
    for speed in options.speed:
        rows += measure(trained, films(trained, options.films, options.frames, speed), options)
        for row in rows:
            row.setdefault("speed", speed)
    found = {
        "machine": describe_machine(options.device),
        "films": options.films,
        "frames": options.frames,
        "ways": rows,
    }
    write_json(options.json, found)
    print(report(found))


def films(trained: TrainedSegmenter, number: int, frames: int, speed: float) -> list[Frame]:
    """The frames of all films, one film after the other."""
    size = tuple(trained.settings.TRAIN.IMAGE_SIZE)
    return [
        (Image.fromarray(image), labels)
        for index in range(number)
        for image, labels in render_film("test", index, size, frames, speed)
    ]


def measure(
    trained: TrainedSegmenter, frames: Sequence[Frame], options: argparse.Namespace
) -> list[dict]:
    """Figures of each way on the frames."""
    ways: dict[str, Callable[[Image.Image], Segmentation]] = {WHOLE: trained.segment}
    for number in options.f_thres:
        ways[f"from zeros, threshold {number}"] = _limited(trained, number)
    for number in options.f_thres:
        ways[f"film, threshold {number}"] = trained.film(number)
    ways[WHOLE](frames[0][0])  # nothing is timed at its first call
    counts = {way: ConfusionMatrix(len(trained.classes)) for way in ways}
    sums: dict[str, list[tuple]] = {way: [] for way in ways}
    for picture, labels in frames:
        whole = None
        for way, segment in ways.items():
            synchronize(options.device)
            clock = time.process_time if options.device.type == "cpu" else time.perf_counter
            start = clock()
            found = segment(picture)
            taken = clock() - start
            whole = found.labels if whole is None else whole
            changed = float((found.labels != whole).mean())
            counts[way].update(torch.from_numpy(found.labels).long(), torch.from_numpy(labels))
            sums[way].append((found.evaluations, found.residual, changed, taken))
    return [
        {
            "way": way,
            "mIoU": counts[way].mean_iou,
            "pixel_accuracy": counts[way].pixel_accuracy,
            **{
                name: mean(column)
                for name, column in zip(
                    ("evaluations", "residual", "changed", "seconds"),
                    zip(*sums[way], strict=True),
                    strict=True,
                )
            },
        }
        for way in ways
    ]


def _limited(trained: TrainedSegmenter, f_thres: int) -> Callable[[Image.Image], Segmentation]:
    """``trained.segment`` with another threshold."""

    def segment(picture: Image.Image) -> Segmentation:
        own, trained.model.f_thres = trained.model.f_thres, f_thres
        try:
            return trained.segment(picture)
        finally:
            trained.model.f_thres = own

    return segment


def report(found: dict) -> str:
    head = ["pixels a frame", "solve", "evaluations", "mean IoU", "pixels right", "changed"]
    head += ["residual", "CPU ms a frame"]
    rows = [
        [
            f"{row['speed']:g}",
            row["way"],
            f"{row['evaluations']:.1f}",
            f"{row['mIoU']:.3f}",
            f"{100 * row['pixel_accuracy']:.2f} %",
            f"{100 * row['changed']:.2f} %",
            f"{row['residual']:.1e}",
            f"{1000 * row['seconds']:.0f}",
        ]
        for row in found["ways"]
    ]
    size = f"{found['films']} films of {found['frames']} frames"
    return f"    {found['machine']} | {size}\n\n{table(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
