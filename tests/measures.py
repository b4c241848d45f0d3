"""Measurements that several tests take."""

from collections.abc import Callable

import torch


def saved_bytes(forward: Callable) -> int:
    """Bytes that autograd saves for backward during ``forward()``."""
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return total
