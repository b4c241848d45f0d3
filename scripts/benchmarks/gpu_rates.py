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
TITLES = dict(zip(PHASES, ("stacked", "equilibrium", "with Jacobian loss"), strict=True))
HEAD = ("setting", "per GPU", "format", *(f"{title} ms" for title in TITLES.values()),
        "evaluations f / b", *(f"{title} GiB" for title in TITLES.values()))  # fmt: skip
NO_MEMORY = "does not fit"
# The same network in two widths: what shows whether the arithmetic limits a step.
PAIR = "imagenet/cls_mdeq_SMALL", "imagenet/cls_mdeq_LARGE"


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
            print(f"| {name} | {kind} | {TITLES[phase]} | {_cells(one)} |", flush=True)
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
            ones = [phases.get(phase, {}) for phase in PHASES]
            times = [_figure(one, "seconds", 1e-3, 0) for one in ones]
            peaks = [_figure(one, "peak_bytes", 2**30, 1) for one in ones]
            nfe = [_figure(ones[1], f"{which}_evaluations", 1, 0) for which in "fb"]
            found.append([name, str(record["batch"]), kind, *times, " / ".join(nfe), *peaks])
    return found


def _figure(one: dict, key: str, unit: float, digits: int) -> str:
    if "error" in one:
        return NO_MEMORY
    return f"{one[key] / unit:.{digits}f}" if key in one else ""


def notes(figures: dict) -> str:
    """What a reader of the table must know of its figures, as a list."""
    settings = figures["settings"]

    def seconds(name: str, kind: str, phase: str = "equilibrium") -> float | None:
        formats = settings.get(name, {}).get("formats", {})
        return formats.get(kind, {}).get(phase, {}).get("seconds")

    lines = [
        f"Each time is the median of {_steps(settings)} steps, after one or two for warm-up. Each"
        " peak is the highest of all these steps."
    ]
    missing = {kind: [name for name in ORDER if not seconds(name, kind)] for kind in FORMATS}
    nothing = [name for name in ORDER if all(name in names for names in missing.values())]
    if nothing:
        lines.append(f"Not measured: {', '.join(nothing)}.")
    for kind, names in missing.items():
        if some := [name for name in names if name not in nothing]:
            lines.append(f"Not measured in {kind}: {', '.join(some)}.")
    for phase, title in TITLES.items():
        times = [
            (name, seconds(name, "f32", phase), seconds(name, "bf16", phase)) for name in ORDER
        ]
        if slower := [name for name, f32, bf16 in times if f32 and bf16 and bf16 > f32]:
            lines.append(f"{title}: bf16 takes longer than f32 for {', '.join(slower)}.")
    pairs = [[seconds(name, kind) for name in PAIR] for kind in ("f32", "bf16")]
    if all(map(all, pairs)):
        f32, bf16 = (f"{large / small:.2f}" for small, large in pairs)
        small, large = PAIR
        lines.append(
            f"At equilibrium, a step of {large} takes {f32} times as long as one of {small} in f32,"
            f" and {bf16} times as long in bf16."
        )
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _steps(settings: dict) -> str:
    """How many steps were measured per figure."""
    phases = (found for one in settings.values() for found in one["formats"].values())
    counts = {one["steps"] for found in phases for one in found.values() if "steps" in one}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"


def _cells(one: dict) -> str:
    if "error" in one:
        return one["error"]
    evaluations = f"{one['f_evaluations']} / {one['b_evaluations']}"
    return f"{1e3 * one['seconds']:.1f} | {evaluations} | {one['peak_bytes'] / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
