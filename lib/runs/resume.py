"""Reads the checkpoint that a run continues from, in one process or several."""

from pathlib import Path

from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.processes import Processes
from lib.runs.retention import load_newest
from lib.runs.trainer import Trainer


def read_checkpoint(
    path: Path, trainer: type[Trainer], processes: Processes
) -> tuple[dict, Path, list[str]]:
    """Read the newest good checkpoint of a run.

    The first process chooses the file, so that all processes continue from the same one.

    Returns:
        The content, the file that was read, and lines for the log.

    Raises:
        InputError: there is no good checkpoint, or another process cannot read the file.
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
