"""Measurements that several tests take."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


class Gathers(TorchDispatchMode):
    """The shapes of all tensors that rows are taken of."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor):
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))
