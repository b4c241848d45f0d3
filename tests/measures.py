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


def differences(a, b, name=""):
    """Names of the entries in which two checkpoints differ by as much as a bit."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{name}/{key}" for key in a.keys() ^ b.keys()]
        for key in a.keys() & b.keys():
            found += differences(a[key], b[key], f"{name}/{key}")
        return found
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]
