"""Training runs of equilibria and stacks, each in a process of one thread, and their CPU time."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from helpers.measure import describe_machine
from lib.errors import InputError
from lib.runs.run_folder import read_metrics

EQUILIBRIUM = "equilibrium"  # the name of a network; a stack has its number of layers
NEVER = 10**9  # steps before the equilibrium, for a stack


def stack_flags(layers: int) -> list[str]:
    """Flags of train_transformer.py for the same layer stacked, and never solved."""
    return f"--n_layer {layers} --eval_n_layer {layers} --pretrain_steps {NEVER}".split()


def machine_of_one_thread() -> str:
    """The machine in words, for runs by :func:`on_one_thread`."""
    described = describe_machine(torch.device("cpu"))
    return described.replace(f"{torch.get_num_threads()} t", "1 t")


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
