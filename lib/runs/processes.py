"""Runs in several processes, started by torchrun."""

import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.errors import InputError, check

_T = TypeVar("_T")
TIMEOUT = "DEQ_TIMEOUT"  # environment variable
_LONGEST = 10_000  # minutes, about a week


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of a run; without torchrun it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank among the processes of this machine, and the number of its GPU

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator["Processes"]:
        """A context among the processes that torchrun started.

        A process waits $DEQ_TIMEOUT minutes (default 15) for another, as a machine without power or
        network sends no error. The longest normal waits are for files of the first process
        (WikiText-103: half a minute).

        After an error the block ends at once, otherwise when all processes have reached its end.
        The process group stays, so a process that joined must exit with :func:`end_at_once`.
        """
        processes = cls._start()
        yield processes
        if processes.world_size > 1:
            dist.barrier()

    @classmethod
    def _start(cls) -> "Processes":
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: "
                "start several processes with torchrun, or unset WORLD_SIZE"
            )
        world_size = _number("WORLD_SIZE", 10**6)
        _number("RANK", world_size)
        _number("MASTER_PORT", 2**16)
        local_rank = _number("LOCAL_RANK", world_size)
        backend = "gloo"
        if torch.cuda.is_available():
            if local_rank < torch.cuda.device_count():  # otherwise gpu() raises the error
                torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_timeout())
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and log."""
        return self.rank == 0

    def gpu(self) -> torch.device:
        """The GPU of this process, which no other process uses.

        Raises:
            InputError: this machine has fewer GPUs than processes.
        """
        there = torch.cuda.device_count()
        # torchrun sets LOCAL_WORLD_SIZE; other launchers may not.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1))
        if self.world_size > 1 and here > there:
            raise InputError(
                f"{here} processes were started on this machine, but it has {there} GPU(s), and "
                f"each process needs one: start at most {there} (torchrun --nproc_per_node)"
            )
        return torch.device("cuda", torch.cuda.current_device())

    def part(self, n: int) -> slice:
        """This process's contiguous share of ``n`` items; the first may have one more."""
        each, over = divmod(n, self.world_size)
        first = self.rank * each + min(self.rank, over)
        return slice(first, first + each + (self.rank < over))

    def vary_seed(self, seed: int) -> None:
        """Give each process but the first its own random stream, so that dropout masks differ.

        Call this after all have built the model from the same ``seed``.
        """
        if self.rank:
            torch.manual_seed(seed + self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: _T) -> list[_T]:
        """The ``value`` of every process by rank; plain containers and tensors."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def lead(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` in the first process only; all return its result, or raise its Exception.

        Otherwise a file that it cannot write would leave the others waiting for it.
        """
        if self.world_size == 1:
            return action()
        outcome = [None, None]
        if self.leads:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def lead_keeps(self, action: Callable[[], _T]) -> _T | None:
        """:meth:`lead` for a result that only the first process needs; others return None."""
        kept: list = []
        self.lead(lambda: kept.append(action()))
        return kept[0] if kept else None

    def raise_together(self, error: Exception | None) -> None:
        """Raise an error that any process has in all processes; None: this one has none."""
        said = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise InputError(f"process {rank}: {text}")

    def next(self, items: Iterator[_T]) -> _T | None:
        """The next item of each process, None at the end; all have the same number.

        An error of one process is raised in all.
        """
        item, error = None, None
        try:
            item = next(items, None)
        except Exception as caught:
            error = caught
        if self.sum(torch.tensor(float(error is not None))) > 0:
            self.raise_together(error)
        return item

    def in_turn(self, action: Callable[[], _T]) -> _T:
        """Run ``action``, which leaves a cache, in every process: on each machine first in one.

        An error is raised only where it occurs.
        """
        if self.world_size == 1:
            return action()
        if self.local_rank == 0:
            try:
                return action()
            finally:
                dist.barrier()
        dist.barrier()
        return action()

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap the model: gradients are averaged; all start from the first process's weights."""
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # PyTorch 2.13 announces a new name for this argument, which 2.4 does not have.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # batch statistics are the same in all processes
                gradient_as_bucket_view=True,
            )
        _settle_buckets(parallel)
        return parallel


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Fix the buckets in which DistributedDataParallel sends gradients.

    It rebuilds them once, in the order in which gradients first become ready, which differs between
    the phases of training. With more than two processes, an element's place in its bucket decides
    the rounding of its sum: a run resumed at equilibrium would round differently. So they are
    rebuilt here, by a backward pass through the sum of all parameters.
    """
    model = parallel.module
    model.forward = lambda: sum(p.sum() for p in model.parameters() if p.requires_grad)
    try:
        parallel().backward()  # records the order; the next forward pass rebuilds the buckets
    finally:
        del model.forward
    parallel.zero_grad(set_to_none=True)


def _number(name: str, below: int) -> int:
    """The environment variable ``name``, a number from 0 to below - 1."""
    text = os.environ[name]
    fits = text.isdecimal() and len(text) < 9 and int(text) < below
    check(fits, name, text, f"an integer from 0 to {below - 1}, as torchrun sets it")
    return int(text)


def _timeout() -> timedelta:
    """How long a process waits for another before it gives up."""
    text = os.environ.get(TIMEOUT, "15")
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    accepted = f"a number of minutes above 0, at most {_LONGEST}"
    check(0 < minutes <= _LONGEST, TIMEOUT, text, accepted)
    return timedelta(minutes=minutes)


def lost_contact(error: BaseException) -> str:
    """What an error says about the loss of another process or the connection; "" if nothing."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting",
             "gloo", "NCCL", "Socket")  # fmt: skip
    text = str(error)
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    ):
        return ""
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    # Removes gloo's source location in front and its general advice at the end.
    return re.sub(r"^\[\S+:\d+\] ", "", first).split(". This is typically caused by")[0]


def end_at_once(code: int) -> None:
    """End this process, if it is one of several, without destroying the process group.

    After an error this must happen while the exception's traceback still refers to the group.
    Dropping the last reference waits, with Python's lock (GIL), for tensors on their way to a
    process that is gone; gloo's threads need the lock to release them (torch 2.13): for ever.

    Without an error Python's exit would destroy gloo in an order that aborts one process in some
    hundreds ("terminate called without an active exception"), for torchrun a failure.
    """
    if dist.is_available() and dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reader of the stream may be gone too
                stream.flush()
        os._exit(code)
