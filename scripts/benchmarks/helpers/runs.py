"""Training runs in processes of their own, with the CPU time that they take."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from lib.errors import InputError
from lib.runs.run_folder import read_metrics


def trained(launch: Callable[[], int], name: str, folder: Path) -> tuple[list[dict], float]:
    """Train by ``launch``; the records in the run's ``folder``, and the CPU minutes of the process.

    Raises:
        InputError: the exit code that ``launch`` returns is not 0.
    """
    before = os.times()
    code = launch()
    after = os.times()
    if code:
        raise InputError(f"the run {name} ended with exit code {code}")
    spent = (getattr(after, x) - getattr(before, x) for x in ("children_user", "children_system"))
    return read_metrics(folder), sum(spent) / 60


def on_one_thread(command: list[str], **environment: str) -> int:
    """Call a command, without its output; the exit code."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=everything).returncode
