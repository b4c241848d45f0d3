"""Estimates on the Jacobian J = df/dz of an equilibrium layer, from products with J alone.

All functions take a pair (f0, z0) with f0 = f(z0) computed from a z0 that requires grad, so they
work on any layer; every sample (dimension 0) has its own Jacobian.
"""

import torch
from torch import Tensor

from lib.errors import InputError

_ARNOLDI_STEPS = 24  # past the power iterations: enough to separate a handful of leading pairs


def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 2, create_graph: bool = True) -> Tensor:
    """Hutchinson estimate of ||J||_F^2 per element, the Jacobian regularisation loss.

    E ||v'J||^2 = ||J||_F^2 for v ~ N(0, I); returned is its mean over ``vecs`` draws divided by
    ``z0.numel()`` (Bai, Koltun and Kolter 2021, arXiv 2106.14342, equation 7).

    Args:
        f0: f(z0), any shape (B, ...).
        z0: the point, of the same shape, requiring grad.
        vecs: number of random vectors, at least 1.
        create_graph: keep the graph, so that the loss can be trained on.

    Returns:
        Scalar tensor of the dtype of ``z0``.
    """
    _check_pair(f0, z0)
    if vecs < 1:
        raise InputError(f"vecs is {vecs!r}, but must be at least 1")
    total = z0.new_zeros(())
    for _ in range(vecs):
        v = torch.randn_like(f0)
        total = total + _vjp(f0, z0, v, create_graph).square().sum()
    return total / vecs / z0.numel()


def jac_loss_weight_at(
    step: int, base: float, increment_every: int, start: int, *, from_start: bool = False
) -> float:
    """Jacobian loss weight after ``step`` updates: ``base`` plus 0.1 per completed interval.

    Language models count the multiples of ``increment_every`` passed after step ``start`` (the
    end of pre-training); with ``from_start``, as image models do, intervals begin at ``start``.
    A function of the step alone, so a resumed run needs no state. 0 or less never grows.
    """
    if increment_every <= 0 or step <= start:
        return base
    passed = (step - start) // increment_every
    if not from_start:
        passed = step // increment_every - start // increment_every
    return base + 0.1 * passed


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 200) -> tuple[Tensor, Tensor]:
    """Spectral radius of J per sample: power iteration, finished by a small Arnoldi process.

    Power iteration alone does not settle on a complex leading pair: its Rayleigh quotient gives
    a real part. Here its last iterates span the leading invariant subspace, and the largest
    |eigenvalue| of J' restricted to their Krylov space is read off (Saad, Numerical Methods for
    Large Eigenvalue Problems, chapter 6).

    Args:
        f0: f(z0), (B, ...).
        z0: the point, of the same shape, requiring grad.
        n_iters: products with J' in all, at least 1.

    Returns:
        The last normalised power iterate, shape of ``z0``, and |eigenvalue| of shape (B, 1).
    """
    _check_pair(f0, z0)
    if n_iters < 1:
        raise InputError(f"n_iters is {n_iters!r}, but must be at least 1")
    batch = len(z0)
    dtype = torch.promote_types(z0.dtype, torch.float32)

    def product(v: Tensor) -> Tensor:  # (B, D) -> J'v, (B, D)
        vector = v.to(f0.dtype).view(f0.shape)
        return _vjp(f0, z0, vector, create_graph=False).reshape(batch, -1).to(dtype)

    v = _normalise(torch.randn_like(z0, dtype=dtype).reshape(batch, -1))[0]
    arnoldi_steps = min(_ARNOLDI_STEPS, (n_iters + 1) // 2, v.shape[1])
    for _ in range(n_iters - arnoldi_steps):
        # A nilpotent J ends at zero: stay at the last direction then.
        grown, growth = _normalise(product(v))
        v = torch.where(growth > 0, grown, v)
    hessenberg = _arnoldi(product, v, arnoldi_steps)
    radius = torch.linalg.eigvals(hessenberg).abs().amax(dim=1, keepdim=True)
    return v.to(z0.dtype).view(z0.shape), radius.to(z0.dtype)


def _arnoldi(product, v: Tensor, steps: int) -> Tensor:
    """Hessenberg matrices (B, steps, steps) of ``product`` in the Krylov space of v (B, D).

    A sample whose space is exhausted (the residual is rounding alone) keeps zero columns: a
    further direction would be noise, and its Ritz values could exceed the spectral radius.
    """
    batch, size = v.shape
    basis = v.new_zeros(batch, steps + 1, size)
    basis[:, 0] = v
    hessenberg = torch.zeros(batch, steps + 1, steps, dtype=torch.float64, device=v.device)
    for j in range(steps):
        w = product(basis[:, j])
        scale = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            overlap = torch.bmm(basis[:, : j + 1], w[:, :, None])  # (B, j + 1, 1)
            w = w - torch.bmm(overlap.transpose(1, 2), basis[:, : j + 1]).squeeze(1)
            hessenberg[:, : j + 1, j] += overlap.squeeze(2).double()
        w, rest = _normalise(w)
        alive = rest > 100 * torch.finfo(w.dtype).eps * scale
        basis[:, j + 1] = torch.where(alive, w, 0.0)
        hessenberg[:, j + 1, j] = torch.where(alive, rest, 0.0).squeeze(1).double()
    return hessenberg[:, :steps]


def _normalise(v: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and norms per row; a zero row stays zero."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / torch.where(norm > 0, norm, 1.0), norm


def _vjp(f0: Tensor, z0: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """v'J; zeros where f does not depend on z."""
    grads = torch.autograd.grad(
        f0, z0, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(z0) if grads[0] is None else grads[0]


def _check_pair(f0: Tensor, z0: Tensor) -> None:
    if f0.shape != z0.shape:
        raise InputError(f"f0 has shape {tuple(f0.shape)}, but z0 has {tuple(z0.shape)}")
    if not z0.requires_grad or not f0.requires_grad:
        raise InputError("f0 must be f(z0) of a z0 that requires grad: call z0.requires_grad_()")
