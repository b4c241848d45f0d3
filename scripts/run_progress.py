"""How far the run of a training command has come, for slurm.sh.

    cd DEQ-Sequence && python ../scripts/run_progress.py train_transformer.py --name try
    cd MDEQ-Vision && python ../scripts/run_progress.py tools/cls_train.py --cfg experiments/...

prints its state and last step, such as "stopped 1200". The states: "new" has no record yet;
"finished" has reached its end; "stopped" has saved and left earlier, by a signal or its time limit;
"running" has not said how it ended: it runs still, or has failed.
"""

import sys
from pathlib import Path

from deq_sequence.options import build_parser
from lib.errors import InputError
from lib.experiment import read_metrics, run_folder
from lib.training import exit_code
from mdeq_vision import command
from mdeq_vision.options import experiment_parser


def folder_of(file: str, flags: list[str]) -> Path:
    """The folder of the run that a command trains; its other flags are left to the command."""
    name = Path(file).name
    if name in ("cls_train.py", "seg_train.py"):
        args, _ = experiment_parser(name, "").parse_known_intermixed_args(flags)
        return command.run_folder(command.load_config(args), args.cfg)
    parser = build_parser()
    if name.endswith(".sh"):
        parser.set_defaults(name=name.removesuffix(".sh"))  # as launch.sh does
    args, _ = parser.parse_known_args(flags)
    if args.name == "N/A":
        raise InputError("a run that may be continued needs a name: add --name")
    return run_folder(args.work_dir, args.dataset, args.name)


def progress(folder: Path) -> tuple[str, int]:
    """State and last step of the run in ``folder``."""
    records = read_metrics(folder)
    if not records:
        return "new", 0
    last = records[-1]
    if last["kind"] != "summary":
        return "running", last["step"]
    return ("finished" if last["finished"] else "stopped"), last["step"]


def main(argv: list[str] | None = None) -> int:
    file, *flags = sys.argv[1:] if argv is None else argv
    return exit_code("run_progress", lambda: print(*progress(folder_of(file, flags))), "")


if __name__ == "__main__":
    sys.exit(main())
