"""Arnoldi's process on a batch of matrices given by their products with vectors.

After m steps, A V = V H + h w e_m'. The columns of (V, w) are orthonormal and span the Krylov space
of the first column. H (m, m) has Hessenberg form. The eigenvalues t of H, the Ritz values, approach
those of A, the outermost first. For H y = t y with ||y|| = 1, the vector x = V y has the residual
||A x - t x|| = |h| |y_m| (Saad, Numerical Methods for Large Eigenvalue Problems, chapter 6).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lib.solvers.norms import orthogonalise

_CHECK_EVERY = 10  # steps: solving the small eigenvalue problem at every step would be slow


class Eigenvalues(NamedTuple):
    """Eigenvalues in order of decreasing modulus, (B, k) complex; residuals, (B, k) real."""

    values: Tensor
    residuals: Tensor


def arnoldi(
    product: Callable[[Tensor], Tensor], v: Tensor, steps: int, *, renew: bool = False
) -> Iterator[Tensor]:
    """Hessenberg matrices (B, m + 1, m) of ``product`` in the Krylov space of v (B, D).

    Yields one matrix for every m from 1 to ``steps``. Its last row holds only h. If the space of a
    sample is exhausted (the rest is rounding alone), h and the further columns are zero: noise
    would have Ritz values that may exceed the spectral radius. With ``renew`` the sample instead
    continues from a random direction orthogonal to the space.
    """
    batch, size = v.shape
    basis = v.new_zeros(batch, steps + 1, size)
    basis[:, 0] = v
    hessenberg = torch.zeros(batch, steps + 1, steps, dtype=torch.float64, device=v.device)
    for j in range(steps):
        w = product(basis[:, j])
        scale = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        w, hessenberg[:, : j + 1, j] = orthogonalise(w, basis[:, : j + 1])
        w, rest = normalise(w)
        alive = rest > 100 * torch.finfo(w.dtype).eps * scale
        hessenberg[:, j + 1, j] = torch.where(alive, rest, 0.0).squeeze(1).double()
        yield hessenberg[:, : j + 2, : j + 1]
        basis[:, j + 1] = torch.where(alive, w, 0.0)
        if renew:
            # Draw at every step: the random numbers of a sample must not depend on the others.
            fresh = torch.randn_like(v)
            if not alive.all():
                fresh = normalise(orthogonalise(fresh, basis[:, : j + 1])[0])[0]
                basis[:, j + 1] = torch.where(alive, w, fresh)


def leading_ritz_values(
    product: Callable[[Tensor], Tensor], v: Tensor, k: int, steps: int, tol: float
) -> Eigenvalues:
    """The k Ritz values of largest modulus, started from v (B, D), and their residuals.

    A sample is done once its k residuals are at most ``tol`` times its largest modulus. Its values
    are then fixed, so they do not depend on the other samples. A sample whose products are not
    finite has NaN. At most ``steps`` products are made, and at most D.
    """
    steps = min(steps, v.shape[1])
    done = torch.zeros(len(v), 1, dtype=torch.bool, device=v.device)
    values = residuals = v.new_zeros(())
    for hessenberg in arnoldi(product, v, steps, renew=True):
        m = hessenberg.shape[2]
        if m < steps and (m < k or m % _CHECK_EVERY):
            continue
        found = ritz_values(hessenberg, k)
        values = torch.where(done, values, found.values)
        residuals = torch.where(done, residuals, found.residuals)
        done = ~(residuals > tol * values[:, :1].abs()).any(dim=1, keepdim=True)
        if done.all():
            break
    return Eigenvalues(values, residuals)


def ritz_values(hessenberg: Tensor, k: int) -> Eigenvalues:
    """The k Ritz values of largest modulus, and their residuals, from (B, m + 1, m) matrices."""
    square, finite = only_finite(hessenberg[:, :-1])
    values, vectors = torch.linalg.eig(square)
    values = values.where(finite[:, None], torch.nan)
    residuals = hessenberg[:, -1, -1:] * vectors[:, -1].abs()
    residuals = residuals.where(finite[:, None], torch.nan)
    # A stable sort keeps the order of LAPACK in a pair: the value above the real axis first.
    order = values.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    return Eigenvalues(values.gather(1, order), residuals.gather(1, order))


def only_finite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Replace matrices that are not finite by zeros, because LAPACK refuses them.

    Returns:
        The matrices (B, m, m), and which of them are finite, (B,) bool.
    """
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    return matrices.where(finite[:, None, None], 0.0), finite


def normalise(v: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and norms, of the rows; a zero row stays zero."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / torch.where(norm > 0, norm, 1.0), norm
