"""Small functions that several equilibrium models share."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from lib.errors import InputError


def list2vec(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten a list of (B, ...) tensors, such as (B, C_i, H_i, W_i), into (B, sum of sizes, 1)."""
    listed = isinstance(tensors, Sequence) and len(tensors) > 0
    if not listed or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        raise InputError("list2vec needs at least one tensor, in a list, each of the form (B, ...)")
    if len({len(t) for t in tensors}) != 1:
        raise InputError(f"batch sizes differ: {[tuple(t.shape) for t in tensors]}")
    return torch.cat([t.reshape(len(t), -1, 1) for t in tensors], dim=1)


def vec2list(z: Tensor, cutoffs: Sequence[Sequence[int]]) -> list[Tensor]:
    """Inverse of :func:`list2vec`: (B, sum of sizes, 1) -> list of ``(B, *shape)`` views.

    Args:
        z: the stacked state.
        cutoffs: the shape of each tensor without its batch dimension, such as (C, H, W).
    """
    sizes = [prod(shape) for shape in cutoffs]
    if z.dim() < 2 or prod(z.shape[1:]) != sum(sizes):
        raise InputError(f"a state of shape {tuple(z.shape)} does not hold the shapes {cutoffs}")
    parts = z.reshape(len(z), -1).split(sizes, dim=1)
    return [part.reshape(len(z), *shape) for part, shape in zip(parts, cutoffs, strict=True)]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """3x3 convolution with padding 1."""
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=bias)


def conv5x5(in_planes: int, out_planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """5x5 convolution with padding 2."""
    return nn.Conv2d(in_planes, out_planes, 5, stride=stride, padding=2, bias=bias)


def norm_diff(
    new: Sequence[Tensor] | Tensor, old: Sequence[Tensor] | Tensor, show_list: bool = False
) -> float | list[float]:
    """||new - old|| over a list of tensors (or a batch); with ``show_list``, one norm per item."""
    norms = [torch.linalg.vector_norm(a - b).item() for a, b in zip(new, old, strict=True)]
    return norms if show_list else sum(norm**2 for norm in norms) ** 0.5
