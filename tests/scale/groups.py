"""Groups of processes on this machine (gloo), each of which runs a script and leaves a result."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.distributed import Processes, end_at_once


def run_group(
    script: str | Path, world_size: int, folder: Path, *argv: str, timeout: float = 600
) -> list[Any]:
    """Run ``script`` in a group of processes, one thread each; what they found, by rank.

    Args:
        script: calls ``work`` with its arguments.
        folder: for the results; created, and used for nothing else.
        argv: further arguments of the script.
        timeout: seconds until the group is given up.
    """
    folder.mkdir(parents=True)
    # Helper modules, which the tests' settings put on the path, are found by the processes too.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen([*command, str(rank), str(world_size), str(folder), *argv], env=env)
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + timeout
        codes = [process.wait(deadline - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * world_size, f"exit codes {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def work(find: Callable[..., Any], argv: list[str]) -> None:
    """One process of a group: join the others, and leave what ``find(processes, *argv)`` found."""
    rank, world_size, folder, *rest = argv
    processes = Processes(int(rank), int(world_size), int(rank))
    torch.set_num_threads(1)
    if processes.world_size > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=processes.rank, world_size=processes.world_size
        )
    found = find(processes, *rest)
    torch.save(found, Path(folder) / f"{rank}.pt")
    if processes.world_size > 1:
        dist.barrier()
    end_at_once(0)
