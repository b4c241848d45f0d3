"""The commands classify and segment: a trained model, and pictures of any kind."""

import csv
import io
import math
import os
from pathlib import Path

import numpy as np

from lib.errors import InputError, check_count, naming
from lib.runs.atomic_files import atomic_write
from lib.runs.checkpoint import check_target
from lib.runs.command_line import Parser, exit_code
from lib.runs.model_file import THREADS, find_device, use_few_threads
from mdeq_vision.model import FOLLOW_THRES
from mdeq_vision.pictures import colour, save_png, to_label_ids
from mdeq_vision.prediction.files import PictureFile, use_each
from mdeq_vision.prediction.predictors import (
    ELSEWHERE,
    Classification,
    Segmentation,
    TrainedClassifier,
    TrainedSegmenter,
)
from mdeq_vision.trained import load

_OUT = "segmented"  # the folder of segment.py's outputs
_KINDS = ("labels", "colours", "overlays", "confidence")  # and its folders


def classify(argv: list[str] | None = None) -> int:
    """Run tools/classify.py; return its exit code."""
    parser = _parser(
        "classify.py",
        "Name the most probable classes of pictures. For each it prints the classes, the "
        "evaluations of f that its equilibrium took, and the relative residual.",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per picture (5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line per picture, too")

    def action():
        args = parser.parse_args(argv)
        check_count("--top", args.top)
        model = _load(args, TrainedClassifier)
        rows: list[list] = []
        top = min(args.top, model.settings.MODEL.NUM_CLASSES)

        def use(picture: PictureFile) -> None:
            found = model.classify(picture.path)
            print(f"{picture.path} | {_classes(found, top)} | {_solve(found)}", flush=True)
            best = [f"{v:.4f}" if type(v) is float else v for pair in found.best(top) for v in pair]
            rows.append([picture.path, *best, found.evaluations, f"{found.residual:.3e}"])

        def check(pictures: list[PictureFile]) -> None:
            if args.csv is not None:
                for source in (args.run, *(picture.path for picture in pictures)):
                    if os.path.exists(source):  # False for a name that is too long, too
                        check_target(source, args.csv)
                _check_folder(args.csv.parent, "--csv")
                if args.csv.is_dir():
                    raise InputError(f"--csv: {args.csv} is a folder: give the name of a file")

        try:
            use_each(args.images, use, check)
        finally:
            if args.csv is not None and rows:
                _write_csv(args.csv, top, rows)

    return exit_code("classify.py", action)


def segment(argv: list[str] | None = None) -> int:
    """Run tools/segment.py; return its exit code."""
    parser = _parser(
        "segment.py",
        "Find the class of each pixel of pictures. For each it writes labels/NAME.png (the ids of "
        "the classes), colours/NAME.png, overlays/NAME.png (the picture, the picture in the "
        "classes' colours, a legend) and confidence/NAME.png (the probability of the class, white "
        "is 1). It prints the share of each class, the mean confidence, the evaluations of f that "
        "the equilibrium took, and the relative residual.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(_OUT), metavar="FOLDER", help=f"of the outputs ({_OUT})"
    )
    parser.add_argument(
        "--sequence",
        action="store_true",
        help="the pictures are frames of a film, in this order: each solve begins at the "
        "equilibrium of the frame before, and takes few evaluations",
    )
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="with --sequence: for every N-th frame, find out whether the film follows another "
        "equilibrium than a solve from the usual start finds; it takes the time of several frames",
    )
    parser.add_argument(
        "--f_thres",
        type=int,
        metavar="N",
        help=f"threshold of the solver for a frame that follows another, with --sequence; at most "
        f"the model's own ({FOLLOW_THRES})",
    )

    def action():
        args = parser.parse_args(argv)
        for flag, value in (("--f_thres", args.f_thres), ("--check", args.check)):
            if value is not None:
                if not args.sequence:
                    raise InputError(f"{flag} is for frames of a film: give --sequence, too")
                check_count(flag, value)
        model = _load(args, TrainedSegmenter)
        film = model.segment
        if args.sequence:
            film = model.film(args.f_thres or FOLLOW_THRES, args.check or 0)
        apart: list[float] = []

        def use(picture: PictureFile) -> None:
            found = film(picture.path)
            if found.apart is not None:
                apart.append(found.apart)
            for kind, array in _arrays(found).items():
                save_png(array, _target(args.out, kind, picture))
            shares = ", ".join(f"{name} {100 * p:.1f} %" for name, p in found.shares.items())
            confidence = f"confidence {found.confidence.mean(dtype=np.float64):.3f}"
            solves = f" in {found.solves} solves" if found.solves > 1 else ""
            print(f"{picture.path} | {shares} | {confidence} | {_solve(found, solves)}")
            if found.apart is not None and found.apart > ELSEWHERE:
                print(f"  another equilibrium than from the usual start: {found.apart:.0e} apart")
            print(f"  {_target(args.out, 'overlays', picture)}", flush=True)

        def check(pictures: list[PictureFile]) -> None:
            _check_folder(args.out, "--out")
            sources = {os.path.realpath(picture.path) for picture in pictures}
            for picture in pictures:
                for target in (_target(args.out, kind, picture) for kind in _KINDS):
                    if os.path.realpath(target) in sources:
                        raise InputError(f"--out: {target} is one of the pictures: give another")

        try:
            use_each(args.images, use, check)
        finally:  # also if a picture could not be read
            if apart:
                print(_said_of(apart))
        if args.check and not apart:
            print(f"no frame was checked: the film has at most {args.check}")

    return exit_code("segment.py", action)


def _parser(program: str, description: str) -> Parser:
    parser = Parser(prog=program, description=description, epilog=f"{THREADS}.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or a file of scripts/export_weights.py")
    add("images", metavar="IMAGE", nargs="+", help="pictures, or folders of pictures")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    return parser


def _load(args, kind: type) -> TrainedClassifier | TrainedSegmenter:
    with naming("--device"):
        device = find_device(args.device)
    model = load(args.run, device)
    if not isinstance(model, kind):
        other = "segment.py" if isinstance(model, TrainedSegmenter) else "classify.py"
        raise InputError(f"{args.run} is a model for tools/{other}: use that, or another model")
    use_few_threads(model.model)
    return model


def _classes(found: Classification, top: int) -> str:
    return ", ".join(f"{name} {100 * p:.2f} %" for name, p in found.best(top))


def _solve(found: Classification | Segmentation, solves: str = "") -> str:
    return f"{found.evaluations} evaluations{solves}, residual {found.residual:.1e}"


def _said_of(apart: list[float]) -> str:
    """What the checked frames of a film showed."""
    elsewhere, lost = sum(d > ELSEWHERE for d in apart), sum(math.isnan(d) for d in apart)
    text = (
        f"{elsewhere} of {len(apart)} checked frames follow another equilibrium than a solve from "
        f"the usual start finds (relative distance above {ELSEWHERE:g})"
    )
    return text + (f"; {lost} did not settle" if lost else "")


def _arrays(found: Segmentation) -> dict[str, np.ndarray]:
    return {
        "labels": to_label_ids(found.labels, found.facts.label_ids),
        "colours": colour(found.labels, found.facts.palette, None),
        "overlays": np.asarray(found.overlay()),
        "confidence": np.rint(255 * found.confidence).astype(np.uint8),
    }


def _target(out: Path, kind: str, picture: PictureFile) -> Path:
    return out / kind / f"{picture.name}.png"


def _check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to, before any work."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(probe):
            pass
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{flag}: {folder} cannot be written to ({error.strerror}): give another place"
        ) from error


def _write_csv(path: Path, top: int, rows: list[list]) -> None:
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    best = [f"{column}_{n}" for n in range(1, top + 1) for column in ("class", "probability")]
    lines.writerow(["image", *best, "evaluations", "residual"])
    lines.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
