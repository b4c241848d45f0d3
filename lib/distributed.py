"""Several processes under torchrun."""

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

from lib.errors import InputError

_T = TypeVar("_T")
TIMEOUT = "DEQ_TIMEOUT"  # environment variable
_LONGEST = 10_000  # minutes: a week


@dataclass(frozen=True)
class Processes:
    """Which of the processes of a run this is; without torchrun, the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its machine: the number of its GPU

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator["Processes"]:
        """Join the processes that torchrun started, for the length of a ``with`` block.

        Tensors on GPUs travel by NCCL, others by gloo. A process that waits for another longer
        than $DEQ_TIMEOUT minutes (15) takes it for lost: a machine without power or network says
        nothing. The longest honest wait is for the first process, which reads a corpus
        (WikiText-103: half a minute) or a list of images for the first time, or writes a
        checkpoint to a slow disk.

        The group is left as it is, after an error at once, else when all have come to the end:
        whoever joined it ends with :func:`end_at_once`.
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
        local_rank = int(os.environ["LOCAL_RANK"])
        backend = "gloo"
        if torch.cuda.is_available():
            if local_rank < torch.cuda.device_count():  # else there is none to compute on: see gpu
                torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_timeout())
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def gpu(self) -> torch.device:
        """The GPU that this process computes on, which no other one does.

        Raises:
            InputError: this machine has fewer GPUs than processes.
        """
        there = torch.cuda.device_count()
        # torchrun says how many; another launcher may not.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1))
        if self.world_size > 1 and here > there:
            raise InputError(
                f"{here} processes were started on this machine, but it has {there} GPU(s), and "
                f"each process needs one: start at most {there} (torchrun --nproc_per_node)"
            )
        return torch.device("cuda", torch.cuda.current_device())

    def part(self, n: int) -> slice:
        """This process's share of ``n`` things in a row: even, the first ones get what is over."""
        each, over = divmod(n, self.world_size)
        first = self.rank * each + min(self.rank, over)
        return slice(first, first + each + (self.rank < over))

    def vary_seed(self, seed: int) -> None:
        """Give every process but the first a random stream of its own: each draws its own masks.

        For when all have built the model from the same ``seed``.
        """
        if self.rank:
            torch.manual_seed(seed + self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: _T) -> list[_T]:
        """The ``value`` of every process, by rank; any plain containers and tensors."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def lead(self, action: Callable[[], _T]) -> _T:
        """Let the first process act while the others wait; its result, or its error, is all's.

        A file that it cannot write stops every process at once, instead of leaving the others
        waiting for one that is gone.
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
        """:meth:`lead` for a result that only the first process needs: None in the others."""
        kept: list = []
        self.lead(lambda: kept.append(action()))
        return kept[0] if kept else None

    def in_turn(self, action: Callable[[], _T]) -> _T:
        """Every process acts, the first one of each machine before the others.

        For what leaves a file behind that makes the next time cheaper. An error is each one's own.
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
        """The model as every process trains it: gradients are averaged over the processes.

        All start from the weights of the first process.
        """
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # PyTorch 2.13 announces another name, which 2.4 does not know yet.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # batch statistics are everywhere the same
                gradient_as_bucket_view=True,
            )
        _settle_buckets(parallel)
        return parallel


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Fix which gradients travel together.

    DistributedDataParallel regroups them once, in the order in which they first become ready. An
    element's place in its group decides in which order more than two processes add it up, and the
    order differs between the phases of training: a run that is resumed at equilibrium would round
    differently from one that began stacked. So let it regroup now, by a sum of all parameters.
    """
    model = parallel.module
    model.forward = lambda: sum(p.sum() for p in model.parameters() if p.requires_grad)
    try:
        parallel().backward()  # the order is noted now, and taken up by the next forward
    finally:
        del model.forward
    parallel.zero_grad(set_to_none=True)


def _timeout() -> timedelta:
    """How long a process waits for another before it takes it for lost."""
    text = os.environ.get(TIMEOUT, "15")
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= _LONGEST:
        raise InputError(
            f"{TIMEOUT} is {text!r}, but must be a number of minutes above 0, at most {_LONGEST}"
        )
    return timedelta(minutes=minutes)


def lost_contact(error: BaseException) -> str:
    """What an error says about another process, or the way to it, being gone; "" if nothing."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting",
             "gloo", "NCCL", "Socket")  # fmt: skip
    text = str(error)
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    ):
        return ""
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    # gloo's own source file in front, and general advice behind
    return re.sub(r"^\[\S+:\d+\] ", "", first).split(". This is typically caused by")[0]


def end_at_once(code: int) -> None:
    """End this process, if it is one of several, without taking their group apart.

    After an error that is while it is still held, and with it all that it came through. Tensors
    may be on their way to a process that is gone, and whoever drops the last reference to their
    group, such as the traceback's to DistributedDataParallel, waits for them: with Python's lock,
    which gloo's threads need to drop the tensors (torch 2.13), so for ever. And where all went
    well, Python's own way to the end takes gloo apart in an order that aborts one process in some
    hundreds ("terminate called without an active exception"), which torchrun takes for a failure.
    """
    if dist.is_available() and dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # whoever read it may be gone too
                stream.flush()
        os._exit(code)
