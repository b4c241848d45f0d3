"""Norms of states at every scale, even if their squares leave the range of the format.

In float32 the square of a number below 1e-19 is zero, and the square of a number above 1e19 is
infinite. From norms of such numbers a state would count as "solved" or "not finite" when it is
neither. Norms are computed as usual on the device and judged on the host. The few that are out of
range are recomputed from the vectors divided by their largest element.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lib.solvers.host import to_device

TINY = 1e-300  # keeps 0 / 0 out of the relative residual of f = 0; far below any real norm


def norms(vectors: Tensor) -> np.ndarray:
    """Norms (B,) of vectors (B, D), on the host in float64."""
    found = torch.linalg.vector_norm(vectors, dim=1).double().cpu().numpy()
    return corrected_norms(found, vectors)


def least_norm(vectors: Tensor) -> float:
    """The limit below which norms of vectors (B, D) lose digits, because squares underflow."""
    limits = torch.finfo(vectors.dtype)
    return math.sqrt(vectors.shape[1] * limits.tiny / limits.eps)


def corrected_norms(
    found: np.ndarray, vectors: Tensor, counts: np.ndarray | None = None
) -> np.ndarray:
    """``found``, norms (B,) of vectors (B, D), recomputed where they are out of range.

    ``counts`` (B,) are the samples to recompute if needed; None means all.
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
    """Norms (B,) of vectors (B, D) at any scale, in float64. Takes two more passes than usual."""
    largest = vectors.abs().amax(1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return largest[:, 0].double() * torch.linalg.vector_norm(scaled, dim=1).double()


def total(parts: np.ndarray) -> float:
    """The norm over the batch, from the norms (B,) of its samples."""
    with np.errstate(over="ignore"):
        square = float(parts.dot(parts))
    if 1e-280 < square < math.inf:
        return math.sqrt(square)
    largest = float(parts.max(initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(np.square(parts / largest).sum())


def relative(g, f):
    """||g|| / ||f|| from the norms, numbers or arrays. Huge where f = 0, but zero for 0 / 0."""
    with np.errstate(over="ignore"):
        return g / (f + TINY)
