"""Resident memory of a training run, after every step, with what may explain its growth."""

import ctypes
import gc
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import linear_regression, mean

import torch

from lib.runs.trainer import Trainer

_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()
        + "fordblks keepcost".split()
    ]


def resident_bytes() -> int:
    """What the operating system counts as this process's memory at the moment."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def heap_bytes() -> int | None:
    """Bytes that malloc has given out and not got back, as glibc counts; None elsewhere."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


@dataclass
class Mark:
    """What there is after a step: resident and given out by malloc, in bytes; live tensors, their
    bytes, and objects that Python's collector knows."""

    step: int
    resident: int
    heap: int | None
    tensors: int
    tensor_bytes: int
    objects: int


@dataclass
class Watch:
    """Resident bytes after step k at ``resident[k - 1]``; a ``Mark`` at each step of ``at``."""

    at: frozenset[int]
    resident: array = field(default_factory=lambda: array("q"))
    marks: list[Mark] = field(default_factory=list)

    def look(self, step: int) -> None:
        self.resident.append(resident_bytes())
        if step in self.at:
            objects = gc.get_objects()
            # Others, such as those of torch.compile, may be without memory of their own.
            tensors = [o for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter)]
            dense = [t for t in tensors if t.layout == torch.strided]  # others have no storage
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in dense}
            held = sum(storage.nbytes() for storage in storages.values())
            counts = len(tensors), held, len(objects)
            self.marks.append(Mark(step, self.resident[-1], heap_bytes(), *counts))


@contextmanager
def watched(watch: Watch, steps: int) -> Iterator[Watch]:
    """Let ``watch`` look after every step of any trainer within the block."""
    update = Trainer.update
    # So that it does not itself grow.
    watch.resident = array("q", bytes(8 * steps))
    del watch.resident[:]

    def update_and_look(trainer: Trainer, batch) -> bool:
        stop = update(trainer, batch)
        watch.look(trainer.step)
        return stop

    Trainer.update = update_and_look
    try:
        yield watch
    finally:
        Trainer.update = update


def slope(resident: Sequence[int], first: int) -> float:
    """Bytes per step of the straight line closest to the values from step ``first`` on."""
    steps = range(first, len(resident) + 1)
    return linear_regression(steps, resident[first - 1 :]).slope


def growth(
    resident: Sequence[int],
    early: tuple[int, int],
    late: tuple[int, int],
    of: Callable[[Sequence[int]], float] = mean,
) -> float:
    """Relative growth of the mean, or ``of`` another figure, after the steps ``early`` (first,
    last) to that of ``late``."""
    before, after = (of(resident[first - 1 : last]) for first, last in (early, late))
    return after / before - 1
