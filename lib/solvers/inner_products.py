"""Accurate inner products of stored vectors, per sample, for the solvers."""

import functools

import torch
from torch import Tensor

# Vectors longer than _LONG are cut into chunks of at least _CHUNK elements.
_LONG, _CHUNK = 4096, 512


def products(vectors: Tensor, rows: Tensor, wide: bool = False) -> Tensor:
    """Inner products of vectors (v, B, D) with rows (r, B, D), per sample: (B, v, r) in float64.

    Long vectors are cut into short chunks, whose sums are added in float64. This is more accurate.
    It is also faster: on long vectors MKL spends up to twice the time of reading the rows on
    packing them.

    Args:
        wide: compute in float64 throughout, for numbers whose squares float32 does not hold.
    """
    if wide:
        vectors, rows = vectors.double(), rows.double()
    v, batch, size = vectors.shape
    parts = chunks(size)
    if parts == 1:
        return torch.bmm(vectors.transpose(0, 1), rows.permute(1, 2, 0)).double()
    chunked = [t.view(-1, batch * parts, size // parts) for t in (vectors, rows)]
    found = torch.bmm(chunked[0].transpose(0, 1), chunked[1].permute(1, 2, 0))
    return found.view(batch, parts, v, -1).sum(1, dtype=torch.float64)


@functools.cache
def chunks(size: int) -> int:
    """The number of chunks: the largest divisor of ``size`` with ``_CHUNK`` or more in each."""
    if size <= _LONG:
        return 1
    return next((n for n in range(size // _CHUNK, 1, -1) if size % n == 0), 1)


def orthogonalise(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (B, D) minus their projections on the orthonormal rows of ``basis`` (B, k, D).

    Returns:
        The remainders (B, D), and the k coefficients of the projections, (B, k) in float64.
    """
    coefficients = vectors.new_zeros((), dtype=torch.float64)
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        overlap = torch.bmm(basis, vectors[:, :, None])  # (B, k, 1)
        vectors = vectors - torch.bmm(overlap.transpose(1, 2), basis).squeeze(1)
        coefficients = coefficients + overlap.squeeze(2).double()
    return vectors, coefficients
