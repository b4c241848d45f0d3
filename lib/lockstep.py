"""The same number of evaluations of f in all processes, where f itself communicates.

With FullyShardedDataParallel (``torch.distributed.fsdp.fully_shard``) or tensor parallelism, f and
its backward gather parameters from all processes. Each process solves for its own samples, so its
solver stops when it likes; those that go on would wait for it for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lib.maps import Map, transformed


@contextmanager
def lockstep(f: Map, point: Tensor, group: "dist.ProcessGroup | None") -> Iterator[Map]:
    """Within a ``with`` block, a form of ``f`` that keeps all processes of ``group`` in step.

    A process that leaves the block goes on evaluating f at ``point``, in vain, until all have left
    it: every one evaluates f as often as the one that needs most. What the block computes is what
    it would be in the process alone. An evaluation costs one more message, of a number.

    Args:
        f: the map; ``f`` itself is what is given if there is no group.
        point: what f accepts.
        group: the processes; None for no others.
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
