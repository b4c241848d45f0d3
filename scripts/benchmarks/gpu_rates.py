"""Measure the training steps of the published settings on a GPU, for scripts/plan_training.py.

    python scripts/benchmarks/gpu_rates.py --json docs/data/gpu_rates.json
    python scripts/benchmarks/gpu_rates.py --settings wt103_deq_transformer_reg --formats bf16
    python scripts/benchmarks/gpu_rates.py --tiny              # on a CPU, to test the command

For each setting, on random data: seconds of a step and most memory in the stacked phase, at the
equilibrium, and with the Jacobian loss; each with the published share of one of four GPUs, and
solves that run to their published thresholds. The file is written after every phase, so that a
run that is broken off leaves what it has. It begins with the settings that matter most.
"""

import json
import sys
import time
import warnings

import torch
from helpers.arguments import Parser, chosen
from helpers.measure import describe_machine, table
from helpers.rates import FORMATS, PHASES, measure, published_share
from helpers.settings import PUBLISHED_GPUS, SIZES, Options, chosen_settings

from lib.deq import DEQWarning
from lib.runs.atomic_files import atomic_write
from lib.runs.command_line import exit_code

ORDER = (
    "wt103_deq_transformer_reg", "wt103_deq_transformer", "wt103_deq_transformer_preln_reg",
    "imagenet/cls_mdeq_SMALL", "imagenet/cls_mdeq_SMALL_reg", "imagenet/cls_mdeq_LARGE",
    "imagenet/cls_mdeq_LARGE_reg", "imagenet/cls_mdeq_XL", "cityscapes/seg_mdeq_SMALL",
    "cityscapes/seg_mdeq_LARGE", "cityscapes/seg_mdeq_XL", "cifar/cls_mdeq_LARGE",
    "cifar/cls_mdeq_LARGE_reg", "cifar/cls_mdeq_TINY",
)  # fmt: skip
HEAD = ("setting", "per GPU", "format", "stacked ms", "equilibrium ms", "with Jacobian loss ms",
        "evaluations f / b", "peak GiB")  # fmt: skip


def build_parser() -> Parser:
    least = {"steps": 1, "batch": 1, "gpus": 1, "vocab": 40}
    parser = Parser(prog="gpu_rates.py", description=__doc__.split("\n\n")[0], least=least)
    add = parser.add_argument
    add("--settings", default=",".join(ORDER), help="names; or language, images, all")
    add("--formats", default=",".join(FORMATS), help="number formats")
    add("--gpus", type=int, default=PUBLISHED_GPUS, help="GPUs that share the published batch")
    add("--batch", type=int, help="samples per step instead of that share")
    add("--vocab", type=int, help="words of the language settings")
    add("--steps", type=int, default=3, help="measured steps of each phase")
    add("--minutes", type=float, default=5.5, help="begin no further step after this time")
    add("--tiny", action="store_true", help="sizes for tests")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure; return the exit code."""
    return exit_code("gpu_rates.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> dict:
    """Measure, print and write; return the figures."""
    args = build_parser().parse_args(argv)
    names, formats = chosen_settings(args.settings), chosen("--formats", args.formats, FORMATS)
    deadline = time.monotonic() + 60 * args.minutes
    size = SIZES["tiny" if args.tiny else "full"]
    gpu = args.device.type == "cuda"
    figures: dict = {
        "machine": describe_machine(args.device),
        "gpu": torch.cuda.get_device_name() if gpu else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        "size": "tiny" if args.tiny else "published",
        "settings": {},
    }

    def write() -> None:
        if args.json is not None:
            with atomic_write(args.json) as file:
                file.write(json.dumps(figures, indent=1).encode() + b"\n")

    print(figures["machine"], flush=True)
    print(table(["setting", "format", "phase", "step ms", "evaluations f / b", "peak GiB"], []))
    write()
    for name in names:
        if time.monotonic() > deadline:
            print(f"| {name} | left out: no time left |", flush=True)
            continue
        options = Options(size=size, device=args.device, vocab=args.vocab)
        options.batch = args.batch or published_share(name, options, args.gpus)
        record = figures["settings"][name] = {"batch": options.batch, "formats": {}}

        def found(kind: str, phase: str, one: dict, name=name, record=record) -> None:
            record["formats"].setdefault(kind, {})[phase] = one
            print(f"| {name} | {kind} | {phase} | {_cells(one)} |", flush=True)
            write()

        with warnings.catch_warnings():
            # Solves without a tolerance end at the threshold, wherever they are.
            warnings.simplefilter("ignore", DEQWarning)
            task = measure(name, options, formats, args.steps, deadline, found)
        record |= {"unit": task.unit, "units_per_step": task.units}
        write()
    return figures


def rows(figures: dict) -> list[list[str]]:
    """The rows of a table of the figures, under :data:`HEAD`."""
    found = []
    for name, record in figures["settings"].items():
        for kind, phases in record["formats"].items():
            seconds = (phases.get(phase, {}).get("seconds") for phase in PHASES)
            times = ["" if s is None else f"{1e3 * s:.0f}" for s in seconds]
            solved = phases.get("equilibrium", {})
            nfe = [str(solved.get(f"{which}_evaluations", "")) for which in "fb"]
            peaks = (phase.get("peak_bytes", 0) for phase in phases.values())
            peak = f"{max(peaks) / 2**30:.1f}"
            found.append([name, str(record["batch"]), kind, *times, " / ".join(nfe), peak])
    return found


def _cells(one: dict) -> str:
    if "error" in one:
        return one["error"]
    evaluations = f"{one['f_evaluations']} / {one['b_evaluations']}"
    return f"{1e3 * one['seconds']:.1f} | {evaluations} | {one['peak_bytes'] / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
