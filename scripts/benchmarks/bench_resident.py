"""Resident memory over a whole training run of each trainer, through both phases.

    python scripts/benchmarks/bench_resident.py                                # 2000 steps of each
    python scripts/benchmarks/bench_resident.py --trainers words --steps 400 --border 100
    MALLOC_TRIM_THRESHOLD_=131072 python scripts/benchmarks/bench_resident.py  # less noise

Each run is the training command itself, in a new process: small models on the quickstart's data,
with the Jacobian loss in both phases, validations, log lines, TensorBoard events and checkpoints.
The process reads its resident memory after every step, before any log, validation or checkpoint.

"growth" compares the mean over 100 steps early in a stretch with the mean over its last 100 steps.
"lowest" compares the minima over the same steps: freed memory that malloc keeps for a while does
not raise them. The requirement is a growth of less than 1 % from the end of the equilibrium
phase's warm-up to the end of the run. The warm-up is 100 steps after the border, or a twentieth of
the run if that is less. Python and PyTorch alone take a hundred MiB or more, so the slope after
the warm-up is also given in MiB.

The tables also show the bytes that malloc has allocated (glibc), the tensors that Python can see,
and the objects that Python's garbage collector knows. If these stay the same while the resident
memory changes, the allocator holds the memory, not the program. glibc adapts its thresholds for
kept memory while a program runs; a fixed threshold, as in the last command, prevents this.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from helpers.arguments import Parser, chosen, write_json
from helpers.measure import describe_machine, in_new_process, table
from helpers.resident import Watch, growth, slope, watched
from helpers.trainers import EMBEDDED, image_configuration, image_file, words_arguments

from deq_sequence.command import run_command
from lib.deq import DEQWarning
from lib.errors import InputError
from lib.runs.command_line import exit_code
from lib.runs.processes import Processes
from mdeq_vision.command import train_classifier, train_segmenter

LIMIT = 0.01
_MIB = 2**20
# Two to four minutes for 2000 steps on one core.
_WORDS = """
    --d_model 64 --n_head 4 --d_head 16 --d_inner 256 --tgt_len 32 --mem_len 32 --eval_tgt_len 32
    --batch_size 8 --max_eval_steps 40
"""
_IMAGES = {
    "digits": "TRAIN.BATCH_SIZE_PER_GPU 16 MODEL.IMAGE_SIZE [12,12]",
    "scenes": "TRAIN.BATCH_SIZE_PER_GPU 4 TRAIN.IMAGE_SIZE [32,32] TEST.NUM_SAMPLES 50",
}


def build_parser() -> Parser:
    least = {"steps": 40, "border": 10, "every": 1, "threads": 1}
    parser = Parser(prog="bench_resident.py", description=__doc__.split("\n\n")[0], least=least)
    add = parser.add_argument
    add("--trainers", default=",".join(EMBEDDED), help=f"of {', '.join(EMBEDDED)}")
    add("--steps", type=int, default=2000, help="training steps of a run")
    add("--border", type=int, default=500, help="stacked steps among these")
    add("--every", type=int, default=100, help="steps between two checkpoints")
    add("--data", type=Path, help="folder of the embedded corpus; default: the quickstart's")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--tiny", action="store_true", help="sizes for tests")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_resident.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; return the figures, one record per trainer."""
    args = build_parser().parse_args(argv)
    names = chosen("--trainers", args.trainers, EMBEDDED)
    if args.steps < 2 * args.border:
        raise InputError(f"--border {args.border} leaves too few of --steps {args.steps} after it")
    if not Path("/proc/self/statm").exists():
        raise InputError("resident memory is read from /proc, which only Linux has")
    torch.set_num_threads(args.threads)
    print(describe_machine(torch.device("cpu")), flush=True)
    records = []
    for name in names:
        watch = in_new_process(train, name, args)
        records.append(_record(name, watch, args))
        print(report(records[-1]), flush=True)
        write_json(args.json, records)
    print("\n" + summary(records), flush=True)
    return records


def train(name: str, args: argparse.Namespace) -> Watch:
    """Do one run in this process, in a temporary folder."""
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", DEQWarning)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        if name == "words":
            command = _words_command(args, folder)
        else:
            command = _image_command(name, args, folder)
        with watched(Watch(_marked(args)), args.steps) as watch:
            command()
        return watch


def _words_command(args: argparse.Namespace, folder: str):
    flags = f"""
        --pretrain_steps {args.border} --max_step {args.steps} --save-interval {args.every}
        --eval-interval {max(args.steps // 8, 1)} --log-interval {max(args.steps // 40, 1)}
    """
    flags = [*("" if args.tiny else _WORDS).split(), *flags.split()]
    flags += ["--work_dir", f"{folder}/words", "--num_threads", str(args.threads)]
    flags += [] if args.data is None else ["--data", str(args.data)]
    found = words_arguments(flags, tiny=args.tiny)
    return lambda: run_command(found)


def _image_command(name: str, args: argparse.Namespace, folder: str):
    opts = ["" if args.tiny else _IMAGES[name], f"TRAIN.PRETRAIN_STEPS {args.border}"]
    opts += [f"SAVE_FREQ {args.every} PRINT_FREQ {max(args.steps // 40, 1)}"]
    opts = [*" ".join(opts).split(), "OUTPUT_DIR", folder, "LOG_DIR", f"{folder}/events"]
    # An epoch is an eighth of the run, or all the data. Each epoch ends with a validation.
    batches, n = max(args.steps // 8, 1), {"digits": 1259, "scenes": 1000}[name]
    cfg = image_configuration(name, *opts, tiny=args.tiny)
    whole = n // cfg.TRAIN.BATCH_SIZE_PER_GPU
    cfg.defrost()
    cfg.PERCENT = min(1.0, (batches + 0.5) / whole)
    cfg.TRAIN.END_EPOCH = -(-args.steps // min(batches, whole))
    cfg.freeze()
    go = train_classifier if name == "digits" else train_segmenter
    return lambda: go(cfg, image_file(name), Processes())


def _windows(args: argparse.Namespace) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Per stretch, the early and the late range (first step, last step) to compare."""
    steps, border, width = args.steps, args.border, min(100, args.steps // 20)
    settled = border + width
    return {
        "stacked": ((2 * border // 5, 2 * border // 5 + width), (border - width + 1, border)),
        "equilibrium": ((settled, settled + width), (steps - width + 1, steps)),
    }


def _marked(args: argparse.Namespace) -> frozenset[int]:
    """The steps that also record malloc, tensors, objects: 200, 600, 1000, 1500, 2000 of 2000."""
    return frozenset(round(args.steps * share) for share in (0.1, 0.3, 0.5, 0.75, 1.0))


def _record(name: str, watch: Watch, args: argparse.Namespace) -> dict:
    resident = list(watch.resident[: args.steps])
    stretches = {
        stretch: {
            "early": early,
            "late": late,
            "growth": growth(resident, early, late),
            "lowest": growth(resident, early, late, of=min),
        }
        for stretch, (early, late) in _windows(args).items()
    }
    (first, last), end = stretches["equilibrium"]["early"], resident[args.border :]
    settled = resident[first - 1 :]
    return {
        "trainer": name,
        "steps": args.steps,
        "border": args.border,
        "resident": resident,
        "marks": [vars(mark) for mark in watch.marks],
        "stretches": stretches,
        "maximum": max(resident),
        "maximum_at": resident.index(max(resident)) + 1,
        # Extremes of single steps after the warm-up, relative to the early mean of "growth".
        "range": [x / statistics.mean(resident[first - 1 : last]) - 1
                  for x in (min(settled), max(settled))],
        "equilibrium_mean": statistics.mean(end),
        "slope": slope(resident, first),
    }  # fmt: skip


def report(record: dict) -> str:
    """Format a record as a markdown section."""
    rows = [
        [
            str(mark["step"]),
            f"{mark['resident'] / _MIB:.1f}",
            "" if mark["heap"] is None else f"{mark['heap'] / _MIB:.1f}",
            str(mark["tensors"]),
            f"{mark['tensor_bytes'] / _MIB:.2f}",
            str(mark["objects"]),
        ]
        for mark in record["marks"]
    ]
    head = ["step", "resident MiB", "malloc MiB", "tensors", "their MiB", "Python objects"]
    lines = []
    for stretch, found in record["stretches"].items():
        (a, b), (c, d) = found["early"], found["late"]
        lines.append(
            f"{stretch}: {100 * found['growth']:+.2f} % (lowest {100 * found['lowest']:+.2f} %) "
            f"from steps {a} to {b} to steps {c} to {d}"
        )
    return (
        f"\n## {record['trainer']}\n\n{record['steps']} steps, of which {record['border']} "
        f"stacked\n\n{table(head, rows)}\n\nGrowth of the mean: {'; '.join(lines)}. Largest "
        f"{record['maximum'] / _MIB:.1f} MiB, after step {record['maximum_at']}."
    )


def summary(records: list[dict]) -> str:
    """Format all trainers in one table, with a column for the requirement."""
    head = [
        "trainer", "resident MiB", "stacked growth %", "equilibrium growth %", "lowest %",
        "single steps % (least, most)", "MiB per 1000 steps", f"below {100 * LIMIT:.0f} %",
    ]  # fmt: skip
    rows = []
    for record in records:
        stacked, later = record["stretches"].values()
        low, high = record["range"]
        rows.append(
            [
                record["trainer"],
                f"{record['equilibrium_mean'] / _MIB:.1f}",
                *(f"{100 * x:+.2f}" for x in (stacked["growth"], later["growth"], later["lowest"])),
                f"{100 * low:+.2f}, {100 * high:+.2f}",
                f"{1000 * record['slope'] / _MIB:+.3f}",
                "yes" if later["growth"] < LIMIT else "no",
            ]
        )
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
