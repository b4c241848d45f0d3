"""What a training run needs: FLOPs, evaluations, memory, steps, hours.

    python scripts/plan_training.py --run wt103_reg --gpus 4 --gpu h100
    python scripts/plan_training.py --run imagenet_SMALL --amp bf16 -- DEQ.F_THRES 20
    python scripts/plan_training.py --run cifar_TINY --check

After -- come flags or overrides as the trainer of the run takes them. FLOPs and memory are counted
on the model. Hours are from steps that were measured on a GPU; where they are an estimate, the
output says so.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

try:
    from lib.errors import InputError, check_count, command_needs
    from lib.runs.atomic_files import atomic_write
    from lib.runs.command_line import Parser, exit_code

    with command_needs("words,images", "plan_training.py"):
        from planner.check import check, check_table
        from planner.gpus import GPUS, MEASURED
        from planner.plan import make_plan
        from planner.report import as_dict, columns, report
        from planner.runs import find_run, known_runs
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("plan_training.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Print the plan that the command line asks for, or the check of its counts."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, more = _split(words)
    args = _parser().parse_args(words)
    check_count("--gpus", args.gpus)
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json: there is no folder {args.json.parent}")
    if args.json is not None and args.json.is_dir():
        raise InputError(f"--json: {args.json} is a folder: name a file")
    names = args.run.split(",")
    runs = [find_run(name, more) for name in names]
    if args.check:
        records = [record for one in runs for record in check(one)]
        found = {"records": records, "table": check_table(records)}
        print("counted / profiler")
        print(columns([found["table"]["head"], *found["table"]["rows"]]))
    else:
        plans = [make_plan(one, args.gpus, args.gpu, _format(args, one)) for one in runs]
        found = [as_dict(plan) for plan in plans]
        print("\n\n\n".join(map(report, plans)))
    if args.json is not None:
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after --."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _format(args, one) -> str:
    """The number format: --amp, or that of the run's own settings."""
    amp = args.amp or one.amp
    if amp == "none":
        return "tf32" if one.tf32 or args.tf32 else "f32"
    return amp


def _parser() -> Parser:
    parser = Parser(
        prog="plan_training.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        usage="%(prog)s --run RUN [flags] [-- flags or overrides of the trainer]",
    )
    add = parser.add_argument
    known = ", ".join(known_runs())
    add("--run", required=True, help=f"{known}; or a yaml file, a launch script, a run's folder")
    add("--gpus", type=int, default=1, help="GPUs that share the batch (1)")
    add("--gpu", default=MEASURED, help=f"{', '.join(GPUS)} ({MEASURED})")
    add("--amp", choices=("none", "bf16"), help="number format of f (the run's own)")
    add("--tf32", action="store_true", help="float32 products with factors in TF32")
    add("--check", action="store_true", help="compare the counts with PyTorch's profiler, on a CPU")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
