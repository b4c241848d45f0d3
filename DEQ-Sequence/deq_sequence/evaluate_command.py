"""The command evaluate.py: the perplexity of a text by a trained language model."""

import argparse
import itertools
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from torch import Tensor

from deq_sequence.evaluation import Evaluation, evaluate
from deq_sequence.text.iterators import LMOrderedIterator
from deq_sequence.text.text_files import read_bytes, read_lines
from deq_sequence.text.vocabulary import UNK
from deq_sequence.token_figures import token_figures
from deq_sequence.trained import TrainedModel
from deq_sequence.use_flags import add_model, check_thresholds, load_model
from lib.errors import InputError, check_count, needs
from lib.runs.atomic_files import atomic_write
from lib.runs.command_line import Parser, exit_code

Row = tuple[int, int, Evaluation]  # mem_len, f_thres, what is reached


def main(argv: list[str] | None = None) -> int:
    """Run evaluate.py and return its exit code."""
    return exit_code("evaluate.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Print what the model reaches on the text, for each --mem_len and --f_thres."""
    args = _parser().parse_args(argv)
    check_count("--batch_size", args.batch_size)
    for flag, path in (("--tokens", args.tokens), ("--figure", args.figure)):
        if path is not None and path.exists():  # before the work
            raise InputError(f"{flag}: {path} exists: give another name")
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{flag}: there is no folder {path.parent}")
    if args.tokens is not None and args.figure is not None and _same(args.tokens, args.figure):
        raise InputError(f"--figure: {args.figure} is the file of --tokens: give another name")
    if args.figure is not None and args.figure.suffix != ".png":
        raise InputError(f"--figure: {args.figure} does not end in .png")
    trained = load_model(args)
    settings = trained.settings
    args.tgt_len = settings.eval_tgt_len if args.tgt_len is None else args.tgt_len
    check_count("--tgt_len", args.tgt_len)
    f_thres, mem_len = args.f_thres or [settings.f_thres], args.mem_len or [settings.mem_len]
    check_thresholds(trained, f_thres, mem_len)
    grid = list(itertools.product(mem_len, f_thres))
    if args.tokens is not None and (len(grid) > 1 or args.batch_size > 1):
        raise InputError("--tokens needs one --mem_len, one --f_thres, and no --batch_size")
    ids = read_text(trained, args.file)
    LMOrderedIterator(ids, args.batch_size, args.tgt_len)  # refuses a short text: before the table
    _say_unknown(trained, ids)
    print(_head(trained))
    rows = []
    for lengths in grid:
        rows.append((*lengths, _measure(trained, ids, *lengths, args)))
        print(_line(trained, *rows[-1]), flush=True)
    if args.figure is not None:
        draw(rows, args.figure, trained)
        print(args.figure)


def read_text(trained: TrainedModel, path: Path) -> Tensor:
    """The ids of a text file, (tokens,).

    Raises:
        InputError: it is missing or not UTF-8, has fewer than two tokens, or has one that the
            vocabulary lacks.
    """
    if not path.is_file():
        raise InputError(f"no file {path}: give a text file")
    if trained.is_of_bytes:
        raw = read_bytes(path)
        raw = raw.lower() if trained.vocabulary.lower_case else raw
        return trained.checked(trained.vocabulary.encode([raw], str(path)), str(path))
    return trained.checked(trained.vocabulary.encode(read_lines(path), str(path)), str(path))


def draw(rows: Sequence[Row], path: Path, trained: TrainedModel) -> None:
    """Write a PNG: perplexity over evaluations of f, a line per memory length."""
    with needs("runs"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for mem_len in dict.fromkeys(row[0] for row in rows):
        points = sorted((found.nfe, _score(trained, found)) for m, _, found in rows if m == mem_len)
        axes.plot(*zip(*points, strict=True), "o-", label=f"memory of {mem_len}")
    axes.set(xlabel="evaluations of f per segment", ylabel=_unit(trained), yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130)
    with atomic_write(path) as file:
        file.write(content.getvalue())


def _parser() -> Parser:
    parser = Parser(
        prog="evaluate.py",
        description="The perplexity of a text file by a trained language model, at equilibrium. "
        "Several values of --mem_len or --f_thres make a table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model(parser)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="UTF-8 text; every line ends a sentence")
    add("--mem_len", type=int, nargs="+", help="lengths of the memory; None: the run's")
    add("--f_thres", type=int, nargs="+", help="most evaluations of f; None: the run's")
    add("--tgt_len", type=int, help="tokens that are solved together; None: the run's")
    add("--batch_size", type=int, default=1, help="streams into which the text is cut")
    add("--tokens", type=Path, metavar="CSV", help="write the figures of each token")
    add("--figure", type=Path, metavar="PNG", help="draw perplexity over evaluations")
    return parser


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _measure(
    trained: TrainedModel, ids: Tensor, mem_len: int, f_thres: int, args: argparse.Namespace
) -> Evaluation:
    options = {"tgt_len": args.tgt_len, "mem_len": mem_len, "f_thres": f_thres}
    if args.tokens is None:
        return evaluate(trained.model, ids, batch_size=args.batch_size, **options)
    found = token_figures(trained.model, ids, **options)
    with atomic_write(args.tokens) as file:
        file.write(found.as_csv(trained.vocabulary).encode("utf-8", "backslashreplace"))
    return found.mean


def _say_unknown(trained: TrainedModel, ids: Tensor) -> None:
    unk = trained.vocabulary.sym2idx.get(UNK)
    share = 0.0 if unk is None else (ids == unk).double().mean().item()
    if share:
        print(f"note: {100 * share:.1f} % of the tokens are {UNK}")


def _unit(trained: TrainedModel) -> str:
    return "bits per byte" if trained.is_of_bytes else "perplexity"


def _score(trained: TrainedModel, found: Evaluation) -> float:
    return found.bits if trained.is_of_bytes else found.perplexity


def _head(trained: TrainedModel) -> str:
    names = ("tokens", "mem_len", "f_thres", _unit(trained), "evaluations", "residual")
    return " ".join(f"{name:>13}" for name in names)


def _line(trained: TrainedModel, mem_len: int, f_thres: int, found: Evaluation) -> str:
    cells = (
        f"{found.tokens}",
        f"{mem_len}",
        f"{f_thres}",
        f"{_score(trained, found):.3f}",
        f"{found.nfe:.1f}",
        f"{found.rel_residual:.1e}",
    )
    return " ".join(f"{cell:>13}" for cell in cells)
