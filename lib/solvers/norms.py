"""Norms and inner products of states, per sample, accurate at every scale.

In float32 the square of a number below 1e-19 is zero, and of one above 1e19 infinite: by such norms
a state would count as "solved" or "not finite" when it is neither. The few norms that are out of
range are recomputed from the vectors divided by their largest element.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

TINY = 1e-300  # keeps 0 / 0 out of the relative residual of f = 0; far below any real norm

# Vectors longer than _LONG are cut into chunks of at least _CHUNK elements.
_LONG, _CHUNK = 4096, 512


def to_device(array: np.ndarray, like: Tensor | torch.device) -> Tensor:
    """Copy an array to a device, or to the device and dtype of a tensor.

    The host does not wait for a GPU: CUDA copies out of pageable memory before it returns. On the
    CPU the tensor is a view of the array if the dtype is the same.
    """
    return torch.from_numpy(array).to(like, non_blocking=True)


def mask_of(samples: np.ndarray, like: Tensor) -> Tensor:
    """``samples`` (B,) as a mask (B, 1) on the device of ``like``."""
    return to_device(samples, like.device)[:, None]


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
    """``found``, norms (B,) of vectors (B, D), recomputed where out of range, if in ``counts``."""
    fails = ~(np.isfinite(found) & (found >= least_norm(vectors)))
    if counts is not None:
        fails &= counts
    if not fails.any():
        return found
    found, indices = found.copy(), to_device(np.flatnonzero(fails), vectors.device)
    found[fails] = scaled_norms(vectors[indices]).cpu().numpy()
    return found


def scaled_norms(vectors: Tensor) -> Tensor:
    """Norms (B,) of vectors (B, D) at any scale, in float64. Takes two more passes than usual."""
    largest = vectors.abs().amax(1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return largest[:, 0].double() * torch.linalg.vector_norm(scaled, dim=1).double()


def total(parts: np.ndarray) -> float:
    """The norm over the batch, from the norms (B,) of its samples."""
    return math.hypot(*parts.tolist())  # at every scale


def relative(g, f):
    """||g|| / ||f|| from the norms, numbers or arrays. Huge where f = 0, but zero for 0 / 0."""
    if type(g) is float:  # overflows without a warning
        return g / (f + TINY)
    with np.errstate(over="ignore"):
        return g / (f + TINY)


def totals(norms: np.ndarray) -> tuple[float, float]:
    """The residual over the batch, 'abs' and 'rel', from norms (2, B) of g and f."""
    found = np.isfinite(norms).all(0)  # samples on which f was finite at least once
    if not found.any():
        return math.inf, math.inf
    g, f = (total(own) for own in norms[:, found])
    return g, relative(g, f)


def products(vectors: Tensor, stored: Tensor, wide: bool = False) -> Tensor:
    """Inner products of vectors (v, B, D) with ``stored`` (r, B, D): (B, v, r) in float64.

    Long vectors are cut into short chunks, whose sums are added in float64. This is more accurate,
    and faster: on long vectors MKL spends up to twice the time of reading ``stored`` on packing it.
    ``wide`` computes in float64 throughout, for numbers whose squares float32 does not hold.
    """
    if wide:
        vectors, stored = vectors.double(), stored.double()
    v, batch, size = vectors.shape
    parts = chunks(size)
    if parts == 1:
        return torch.bmm(vectors.transpose(0, 1), stored.permute(1, 2, 0)).double()
    first, second = (t.view(-1, batch * parts, size // parts) for t in (vectors, stored))
    found = torch.bmm(first.transpose(0, 1), second.permute(1, 2, 0))
    return found.view(batch, parts, v, -1).sum(1, dtype=torch.float64)


@functools.cache
def chunks(size: int) -> int:
    """The number of chunks: the largest divisor of ``size`` with ``_CHUNK`` or more in each."""
    if size <= _LONG:
        return 1
    return next((n for n in range(size // _CHUNK, 1, -1) if size % n == 0), 1)


def orthogonalise(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (B, D) minus their projections on the orthonormal rows of ``basis`` (B, k, D).

    Returns those and the coefficients of the projections, (B, k) in float64.
    """
    coefficients = vectors.new_zeros((), dtype=torch.float64)
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        overlap = torch.bmm(basis, vectors[:, :, None])  # (B, k, 1)
        vectors = vectors - torch.bmm(overlap.transpose(1, 2), basis).squeeze(1)
        coefficients = coefficients + overlap.squeeze(2).double()
    return vectors, coefficients
