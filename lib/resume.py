"""Reading the checkpoint that a run continues from, in one process or many."""

from pathlib import Path

from lib.checkpoint import load
from lib.distributed import Processes
from lib.errors import InputError
from lib.retention import load_newest
from lib.trainer import Trainer


def read_checkpoint(
    path: Path, trainer: type[Trainer], processes: Processes
) -> tuple[dict, Path, list[str]]:
    """The newest checkpoint at ``path`` that is whole: its content, its file, lines for the log.

    The first process chooses, so that all continue from the same one.

    Raises:
        InputError: there is none; or another process cannot see the file.
    """
    kept: list = []

    def choose() -> tuple[Path, list[str]]:
        lines: list[str] = []
        content, used = load_newest(path, trainer.check, lines.append)
        kept.append(content)
        return used, lines

    used, lines = processes.lead(choose)
    if kept:
        return kept[0], used, lines
    try:
        return load(used), used, lines
    except InputError as error:
        raise InputError(
            f"process {processes.rank} cannot read what the first one reads: {error} (all machines "
            "need the run's folder on a file system that they share)"
        ) from error
