"""Norms of states at every scale: right where their squares leave the range of the format, too.

In float32 the square of a number below 1e-19 is zero and that of one above 1e19 is infinite. A
norm of such numbers would say "solved", or "not finite", of a state that is neither. Norms are
taken as usual, on the device, and judged on the host; the few that are out of range are found
again, from the vectors divided by their largest element.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lib.host import to_device

TINY = 1e-300  # keeps 0 / 0 out of the relative residual of f = 0; far below any real norm


def norms(vectors: Tensor) -> np.ndarray:
    """Norms (B,) of vectors (B, D), on the host in float64."""
    found = torch.linalg.vector_norm(vectors, dim=1).double().cpu().numpy()
    return mended(found, vectors)


def least_norm(vectors: Tensor) -> float:
    """Below this a norm of vectors (B, D) is not good to all digits: squares underflow."""
    limits = torch.finfo(vectors.dtype)
    return math.sqrt(vectors.shape[1] * limits.tiny / limits.eps)


def mended(found: np.ndarray, vectors: Tensor, counts: np.ndarray | None = None) -> np.ndarray:
    """``found``, norms (B,) of vectors (B, D), with those that are out of range found again.

    Args:
        counts: (B,) the samples that it matters for; all if None.
    """
    fails = ~(np.isfinite(found) & (found >= least_norm(vectors)))
    if counts is not None:
        fails &= counts
    if not fails.any():
        return found
    rows = to_device(np.flatnonzero(fails), vectors.device)
    found = found.copy()
    found[fails] = scaled_norms(vectors[rows]).cpu().numpy()
    return found


def scaled_norms(vectors: Tensor) -> Tensor:
    """Norms (B,) of vectors (B, D) of any size, in float64: by two more passes than usual."""
    largest = vectors.abs().amax(1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return largest[:, 0].double() * torch.linalg.vector_norm(scaled, dim=1).double()


def total(parts: np.ndarray) -> float:
    """The norm over the batch, from those of its samples (B,)."""
    with np.errstate(over="ignore"):
        square = float(parts.dot(parts))
    if 1e-280 < square < math.inf:
        return math.sqrt(square)
    largest = float(parts.max(initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(np.square(parts / largest).sum())


def relative(g, f):
    """||g|| / ||f|| of norms, numbers or arrays; huge where f = 0, but zero for 0 / 0."""
    with np.errstate(over="ignore"):
        return g / (f + TINY)
