"""What the processes of a run send each other, and how long they wait for it."""

import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

KINDS = ("gradients", "batch norm", "control")
# Which module calls a collective tells what it is for.
_CALLERS = {"mdeq_vision.sync_batchnorm": "batch norm", "lib.runs.processes": "control"}
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "barrier")


@dataclass
class Traffic:
    """Counts of one process over some steps.

    Attributes:
        bytes: handed to collectives, by kind. How often they travel depends on the algorithm: a
            ring sends them 2 (N - 1) / N times to sum them over N processes.
        calls: number of collectives, by kind.
        waits: seconds until each collective was done, in the order of the calls, which is the same
            in all processes. That of the gradients, which begin to travel while others are still
            computed, is from the last one computed to the end of backward.
    """

    bytes: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    _last_gradient: float | None = None

    def watch(self, parallel: torch.nn.Module) -> None:
        """Count the gradients of a model from now on; once per model."""
        if not isinstance(parallel, DistributedDataParallel):
            return

        def hook(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            self.bytes["gradients"] += bucket.buffer().nbytes
            self.calls["gradients"] += 1
            self._last_gradient = time.perf_counter()
            return allreduce_hook(None, bucket)

        parallel.register_comm_hook(None, hook)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the collectives of all modules of ``lib`` within the block."""
        before = {name: getattr(dist, name) for name in _COLLECTIVES}
        backward = torch.Tensor.backward
        for name, call in before.items():
            setattr(dist, name, self._counting(call))
        torch.Tensor.backward = self._waiting(backward)
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(dist, name, call)
            torch.Tensor.backward = backward

    def _counting(self, call: Callable) -> Callable:
        @wraps(call)
        def counting(*args, **kwargs):
            kind = _CALLERS.get(sys._getframe(1).f_globals["__name__"])
            if kind is None:  # of the gradients' hook
                return call(*args, **kwargs)
            self.bytes[kind] += _payload(args)
            self.calls[kind] += 1
            start = time.perf_counter()
            done = call(*args, **kwargs)
            self.waits.append(time.perf_counter() - start)
            return done

        return counting

    def _waiting(self, backward: Callable) -> Callable:
        @wraps(backward)
        def waiting(*args, **kwargs):
            self._last_gradient = None
            backward(*args, **kwargs)
            if self._last_gradient is not None:
                self.waits.append(time.perf_counter() - self._last_gradient)

        return waiting


def _payload(args: tuple) -> int:
    """Bytes that a process hands in: the last tensor among the arguments, or a pickled object."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if tensors:
        return tensors[-1].nbytes
    return len(pickle.dumps(args[-1])) if args else 0
