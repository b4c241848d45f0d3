"""Are they equilibria? Audits of the examples and of the quickstart's runs, as one table.

    bash scripts/quickstart.sh                                      # trains words, digits, scenes
    python scripts/benchmarks/bench_audits.py --json docs/data/audits.json
    python scripts/benchmarks/bench_audits.py --only "prefix sums, jfb" mazes

An example is trained here, from its seed 0. The prefix sums are audited at 32, 64 and 128 bits (20
strings each, all bits right), the mazes at 9 x 9 and 17 x 17 cells (40 each, all cells right), the
runs as scripts/audit.py does. With --json, audits that the file has already are kept: to make one
again, name it by --only.
"""

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, table
from torch import Tensor

from deq_sequence.audits import audit_run as audit_words
from lib import audit
from lib.auditing import OWN, Audit
from lib.errors import InputError
from lib.runs.command_line import exit_code
from mdeq_vision.audits import audit_run as audit_images

ROOT = Path(__file__).resolve().parents[2]
BITS, STRINGS = (32, 64, 128), 20
CELLS, MAZES = (9, 17), 40
SAMPLES = 50  # segments of words, or images


def example(name: str) -> ModuleType:
    """A file of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prefix_sums(grad: str) -> Audit:
    module = example("prefix_sums")
    model = module.train(0, grad)
    torch.manual_seed(1)

    def length(logits: Tensor, answer: Tensor) -> Tensor:
        return torch.full((len(answer),), float(answer.shape[1]))

    return audit(
        model,
        [module.strings(STRINGS, bits) for bits in BITS],
        lambda logits, answer: (logits.argmax(dim=1) == answer).all(dim=1),
        difficulty=length,
        measure="exact",
    )


def mazes() -> Audit:
    module = example("mazes")
    model, _ = module.train(0)
    drawn = [module.mazes(MAZES, n, random.Random(n)) for n in CELLS]
    return audit(
        model,
        [((sides, ends), path) for sides, ends, path in drawn],
        module.exact,
        difficulty=lambda logits, path: path.sum(dim=(1, 2)),
        forward=lambda inputs: model(*inputs),
        measure="exact",
    )


def run_of(audit_run: Callable[..., Audit], folder: str) -> Audit:
    if not (ROOT / folder).is_dir():
        raise InputError(f"there is no run in {folder}: call scripts/quickstart.sh first")
    return audit_run(ROOT / folder, SAMPLES, torch.device("cpu"))


AUDITS: dict[str, Callable[[], Audit]] = {
    "prefix sums, phantom": partial(prefix_sums, "phantom:steps=3,damping=1"),
    "prefix sums, jfb": partial(prefix_sums, "jfb"),
    "prefix sums, ift": partial(prefix_sums, "ift"),
    "mazes": mazes,
    "words": partial(run_of, audit_words, "DEQ-Sequence/LM-TFM-demo/quickstart"),
    "digits": partial(run_of, audit_images, "MDEQ-Vision/output/digits/cls_mdeq_TINY"),
    "scenes": partial(run_of, audit_images, "MDEQ-Vision/output/digit_scenes/seg_mdeq_TINY"),
}

HEAD = ["model", "verdict", "measure", "skipped, at threshold, at 4 x", "there from", "residual",
        "settle", "come back, elsewhere", "radius: mean, largest", "difficulty"]  # fmt: skip


def row(name: str, found: dict) -> list[str]:
    """The table row of one audit, from its dictionary."""
    cuts = {cut["name"]: cut for cut in found["cuts"]}
    ends = [cuts["skipped"], cuts[OWN], found["cuts"][-1]]
    starts, radius, rank = found["starts"], found["radius"], found["effort"]["correlation"]
    back, elsewhere = (
        sum(values) / len(starts)
        for values in (
            [s["settled"] - s["elsewhere"] for s in starts],
            [s["elsewhere"] for s in starts],
        )
    )
    settled = radius["mean"] is not None
    return [
        name,
        f"**{found['verdict']}**",
        found["measure"],
        ", ".join(f"{cut['measure']:.3f}" for cut in ends),
        found["enough"],
        f"{cuts[OWN]['residual']:.1e}",
        f"{found['patient']:.0%}",
        f"{back:.0%}, {elsewhere:.0%}",
        f"{radius['mean']:.2f}, {radius['largest']:.2f}" if settled else "-",
        "-" if rank is None else f"{rank:+.2f}",
    ]


def report(figures: dict) -> str:
    """The table of all audits, in the order of :data:`AUDITS`."""
    rows = [row(name, figures["audits"][name]) for name in AUDITS if name in figures["audits"]]
    return table(HEAD, rows)


def findings(figures: dict) -> str:
    """A line for each audit: what the residual says of correctness."""
    told = {name: figures["audits"].get(name) for name in AUDITS}
    lines = [[name, found["correctness"]["said"]] for name, found in told.items() if found]
    return table(["model", "residual and correctness"], lines)


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_audits.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_audits.py", description=__doc__.split("\n\n")[0])
    names = ", ".join(repr(name) for name in AUDITS)
    parser.add_argument("--only", nargs="+", choices=list(AUDITS), metavar="MODEL", help=names)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    kept = {}
    if args.json is not None and args.json.is_file():
        kept = json.loads(args.json.read_text(encoding="utf-8"))["audits"]
    figures = {"machine": describe_machine(torch.device("cpu")), "audits": kept}
    for name in args.only or [name for name in AUDITS if name not in kept]:
        start = time.process_time()
        found = AUDITS[name]()
        seconds = time.process_time() - start
        kept[name] = {**found.as_dict(), "cpu_seconds": round(seconds)}
        print(f"# {name}, {seconds:.0f} CPU seconds\n\n{found}\n", flush=True)
        write_json(args.json, figures)  # each time: an interrupted benchmark keeps its figures
    print(f"{report(figures)}\n\n{findings(figures)}")


if __name__ == "__main__":
    sys.exit(main())
