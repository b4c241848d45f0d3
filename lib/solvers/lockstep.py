"""Keep the number of evaluations of f equal in all processes, for an f that communicates.

With FullyShardedDataParallel (``torch.distributed.fsdp.fully_shard``) or tensor parallelism, f and
its backward gather parameters from all processes. Each process solves for its own samples, and its
solver stops by itself. The processes that continue would then wait for it forever.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lib.solvers.maps import Map, transformed


@contextmanager
def lockstep(f: Map, point: Tensor, group: "dist.ProcessGroup | None") -> Iterator[Map]:
    """A context that gives a form of ``f`` which keeps all processes of ``group`` in step.

    A process that leaves the block evaluates f at ``point`` and discards the value, until all
    processes have left. So every process evaluates f as often as the process that needs the most
    evaluations. The block computes the same values as in a single process. Each evaluation costs
    one more all-reduce, of a single number.

    Without a group there is one process, and the context gives ``f`` itself.
    """
    if group is None:
        yield f
        return

    def others_go_on(i_do: bool) -> Tensor:
        active = torch.full((), float(i_do), device=point.device)
        dist.all_reduce(active, dist.ReduceOp.MAX, group=group)
        return active

    def change(f: Map) -> Map:
        def evaluated(z: Tensor) -> Tensor:
            others_go_on(True)
            return f(z)

        return evaluated

    yield transformed(f, change)
    while others_go_on(False):
        f(point)
