"""Print the progress of a training command's run, for slurm.sh.

    cd DEQ-Sequence && python ../scripts/cluster/run_progress.py train_transformer.py --name try
    cd MDEQ-Vision && python ../scripts/cluster/run_progress.py tools/cls_train.py --cfg ...

prints the run's state and last step, such as "stopped 1200". The states are

    new        the run has no record yet
    finished   the run has reached its end
    stopped    a signal or the time limit stopped the run early; its state is saved
    running    the run has no last record: it still runs, or has failed
"""

import sys
from pathlib import Path

try:
    from deq_sequence import options
    from lib.errors import InputError
    from lib.runs.command_line import exit_code
    from lib.runs.run_folder import read_metrics
    from mdeq_vision import command
    from mdeq_vision.options import experiment_parser
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)


def folder_of(file: str, flags: list[str]) -> Path:
    """The folder of the run that a command trains.

    Raises:
        InputError: a language model's run has no name.
    """
    name = Path(file).name
    if name in ("cls_train.py", "seg_train.py"):
        args, _ = experiment_parser(name, "").parse_known_intermixed_args(flags)
        return command.run_folder(command.load_config(args), args.cfg)
    parser = options.build_parser()
    if name.endswith(".sh"):
        parser.set_defaults(name=name.removesuffix(".sh"))  # as launch.sh does
    args, _ = parser.parse_known_args(flags)
    if args.name == "N/A":
        raise InputError("a run that may be continued needs a name: add --name")
    return options.folder_of(args)


def progress(folder: Path) -> tuple[str, int]:
    """The state and last step of the run in ``folder``."""
    records = read_metrics(folder)
    if not records:
        return "new", 0
    last = records[-1]
    if last["kind"] != "summary":
        return "running", last["step"]
    return ("finished" if last["finished"] else "stopped"), last["step"]


def main(argv: list[str] | None = None) -> int:
    file, *flags = sys.argv[1:] if argv is None else argv
    return exit_code("run_progress", lambda: print(*progress(folder_of(file, flags))))


if __name__ == "__main__":
    sys.exit(main())
