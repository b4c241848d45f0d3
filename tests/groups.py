"""Groups of processes on this machine (gloo), each of which runs a script and leaves a result."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attempts import Attempt, ForkServer
from lib.runs.processes import Processes, end_at_once


def run_group(
    script: str | Path,
    world_size: int,
    folder: Path,
    *argv: str,
    server: ForkServer | None = None,
    timeout: float = 600,
) -> list[Any]:
    """Run ``script`` in a group of processes, one thread each; what they found, by rank.

    Args:
        script: calls ``work`` with its arguments.
        folder: for the results; created, and used for nothing else.
        argv: further arguments of the script.
        server: fork from it instead of starting interpreters.
        timeout: seconds until the group is given up.
    """
    folder.mkdir(parents=True)
    with ExitStack() as started:
        processes = [
            started.enter_context(
                Attempt(
                    [str(script), str(rank), str(world_size), str(folder), *argv],
                    server=server,
                    patience=timeout,
                )
            )
            for rank in range(world_size)
        ]
        codes = [process.wait() for process in processes]
        said = "".join(process.errors() for process in processes)
    assert codes == [0] * world_size, f"exit codes {codes}: {said}"
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
