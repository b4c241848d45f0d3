"""Measurements that several tests take."""

import weakref
from collections.abc import Callable

import torch


class _Held:
    """A tensor that autograd has saved."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(forward: Callable) -> int:
    """Bytes that autograd has saved for backward once ``forward()`` is done.

    Graphs that are gone by then do not count.
    """
    total = 0

    def change(size: int) -> None:
        nonlocal total
        total += size

    def pack(t):
        # Detached: an output of a node would hold that node, and so itself.
        held, size = _Held(t.detach()), t.numel() * t.element_size()
        change(size)
        weakref.finalize(held, change, -size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = forward()
    found = total
    del result
    return found
