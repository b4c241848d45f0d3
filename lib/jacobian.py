"""Estimates of the Jacobian J = df/dz of an equilibrium layer, from products with J alone.

All functions take a pair (f0, z0): z0 requires grad, and f0 = f(z0) has the same shape (B, ...).
Another pair raises an :class:`~lib.errors.InputError`, as does an argument out of range. Every
sample (dimension 0) has its own Jacobian, of D = z0[0].numel() columns.

Example (a rotation, shrunk: eigenvalues 0.8 e^(+-i pi/2), spectral norm 0.8)::

    >>> import torch
    >>> from lib.jacobian import contraction_bound, leading_eigenvalues, squared_frobenius_norm
    >>> z0 = torch.zeros(1, 2, requires_grad=True)
    >>> f0 = z0 @ torch.tensor([[0.0, 0.8], [-0.8, 0.0]])
    >>> values, residuals = leading_eigenvalues(f0, z0, k=2)
    >>> [f"{value:.2f}" for value in values.imag[0].tolist()]
    ['0.80', '-0.80']
    >>> f"{contraction_bound(f0, z0).item():.2f}"  # below 1: f contracts near z0
    '0.80'
    >>> norm = squared_frobenius_norm(f0, z0, vecs=2)
    >>> f"{norm.estimate.item():.2f} +- {norm.standard_error.item():.2f}"
    '1.28 +- 0.00'

The functions keep the graph of f0: several of them and a training step may use it. Only the result
of :func:`jac_loss_estimate` can be differentiated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lib.errors import InputError, check, check_count
from lib.solvers.maps import Map, vjp
from lib.solvers.norms import orthogonalise

_ARNOLDI_STEPS = 24  # after the power iterations: enough to separate a few leading pairs
_LEADING_STEPS = 100  # default steps of leading_eigenvalues
_CHECK_EVERY = 10  # steps: solving the small eigenvalue problem at every step would be slow

# Random vectors v with E v v' = I. Rademacher: +1 or -1 with equal probability.
VECTORS = {
    "gaussian": torch.randn_like,
    "rademacher": lambda x: torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1),
}


class HutchinsonEstimate(NamedTuple):
    """The result of :func:`squared_frobenius_norm`."""

    estimate: Tensor
    standard_error: Tensor


class Eigenvalues(NamedTuple):
    """The result of :func:`leading_eigenvalues`, in order of decreasing modulus."""

    values: Tensor
    residuals: Tensor


def jac_loss_estimate(
    f0: Tensor,
    z0: Tensor,
    vecs: int = 2,
    create_graph: bool = True,
    *,
    vectors: str = "gaussian",
) -> Tensor:
    """Hutchinson estimate of ||J||_F^2 per element, the Jacobian regularisation loss.

    E ||v'J||^2 = ||J||_F^2 for random v with E v v' = I. The estimate is the mean of ||v'J||^2 over
    ``vecs`` draws, divided by ``z0.numel()`` (Bai, Koltun and Kolter 2021, arXiv 2106.14342,
    equation 7).

    Args:
        vecs: number of random vectors, at least 1.
        create_graph: build the graph of the loss, so that the loss can be trained on.
        vectors: "gaussian", as in the paper, or "rademacher", which has a lower variance (see
            :func:`squared_frobenius_norm`).

    Returns:
        Scalar tensor of the dtype of ``z0``.
    """
    _check_pair(f0, z0)
    check_count("vecs", vecs, 1)
    draw = _vectors_named(vectors)
    total = z0.new_zeros(())
    for _ in range(vecs):
        total = total + vjp(f0, z0, draw(f0), create_graph=create_graph).square().sum()
    return total / vecs / z0.numel()


def squared_frobenius_norm(
    f0: Tensor, z0: Tensor, vecs: int = 16, *, vectors: str = "rademacher"
) -> HutchinsonEstimate:
    """Hutchinson estimate of ||J||_F^2 per sample, with its standard error.

    The estimate is the mean of ||v'J||^2 over ``vecs`` draws; its standard error is their standard
    deviation / sqrt(vecs). :func:`jac_loss_estimate` is the mean estimate of all samples, over D.

    With G = J J', the variance of one draw v'G v is 2 ||G||_F^2 for Gaussian vectors and
    2 (||G||_F^2 - sum_i G_ii^2) for Rademacher vectors: never more, and zero if G is
    diagonal (Hutchinson 1990; Avron and Toledo 2011).

    Args:
        vecs: number of random vectors, at least 2.
        vectors: "rademacher" or "gaussian".

    Returns:
        Estimate and standard error, each (B,), in the dtype of ``z0``, at least float32.
    """
    _check_pair(f0, z0)
    check_count("vecs", vecs, 2)
    draw = _vectors_named(vectors)
    product = _transposed_product(f0, z0)
    draws = [product(draw(f0)).double().square().sum(dim=1) for _ in range(vecs)]
    std, mean = torch.std_mean(torch.stack(draws), dim=0)
    dtype = _real_dtype(z0)
    return HutchinsonEstimate(mean.to(dtype), (std / vecs**0.5).to(dtype))


def jac_loss_weight_at(
    step: int, base: float, increment_every: int, start: int, *, from_start: bool = False
) -> float:
    """Jacobian loss weight after ``step`` updates: ``base`` plus 0.1 per completed interval.

    By default, as in the language models, an interval is completed at each multiple of
    ``increment_every`` after step ``start`` (the end of pre-training). With ``from_start``, as in
    the image models, intervals begin at ``start``. With ``increment_every`` of 0 or less the weight
    stays ``base``.
    """
    if increment_every <= 0 or step <= start:
        return base
    passed = (step - start) // increment_every
    if not from_start:
        passed = step // increment_every - start // increment_every
    return base + 0.1 * passed


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 200) -> tuple[Tensor, Tensor]:
    """Spectral radius of J per sample: power iteration, finished by a small Arnoldi process.

    Power iteration alone does not converge for a leading complex pair: its Rayleigh quotient gives
    a real part. Here Arnoldi's process starts from the last power iterate, whose Krylov space
    approximates the leading invariant subspace. The radius is the largest modulus of the Ritz
    values of J' in this space (Saad, Numerical Methods for Large Eigenvalue Problems, chapter 6).

    Args:
        n_iters: total number of products with J', at least 1.

    Returns:
        The last normalised power iterate, shaped like ``z0``, and the spectral radius (B, 1).
    """
    _check_pair(f0, z0)
    check_count("n_iters", n_iters, 1)
    product = _transposed_product(f0, z0)
    v = _random_directions(z0)
    arnoldi_steps = min(_ARNOLDI_STEPS, (n_iters + 1) // 2, v.shape[1])
    for _ in range(n_iters - arnoldi_steps):
        # A nilpotent J maps the iterate to zero: keep the last direction then.
        grown, growth = normalise(product(v))
        v = torch.where(growth > 0, grown, v)
    *_, hessenberg = arnoldi(product, v, arnoldi_steps)
    radius = torch.linalg.eigvals(hessenberg[:, :-1]).abs().amax(dim=1, keepdim=True)
    return v.to(z0.dtype).view(z0.shape), radius.to(z0.dtype)


def leading_eigenvalues(
    f0: Tensor, z0: Tensor, k: int = 6, *, steps: int | None = None, tol: float = 1e-6
) -> Eigenvalues:
    """The k eigenvalues of J of largest modulus per sample, including complex ones.

    Arnoldi's process with J' starts from a random vector. A value t is an eigenvalue of J + E for
    some E with ||E||_2 equal to its residual. If J is normal, the error of t is at most the
    residual; otherwise it is up to about the residual times the condition number of the eigenvalue
    (Saad, chapters 3 and 6; see :func:`power_method`). A residual below the rounding error of J
    shows only an error of that size.

    A sample whose Krylov space is exhausted continues from a new random vector, so zero and scaled
    identity Jacobians give all k eigenvalues. If it is not exhausted, copies of a multiple
    eigenvalue may be missing.

    Args:
        k: number of eigenvalues, from 1 to D. The last one may be half of a conjugate pair.
        steps: the largest number of products with J', at least k; at most D are made. All vectors
            are kept: steps * D numbers per sample. The default is 100, or 4 k if that is more.
        tol: a sample is done once its k residuals are at most tol times its largest modulus.

    Returns:
        Values, (B, k) complex, and residuals, (B, k) real, in the precision of ``z0``, at least
        float32. In a conjugate pair the value above the real axis comes first. A sample whose
        Jacobian is not finite has NaN and does not affect the other samples.
    """
    _check_pair(f0, z0)
    size = z0.shape[1:].numel()
    check(1 <= k <= size, "k", k, f"from 1 to {size}, the numbers in a sample of z0")
    steps = max(_LEADING_STEPS, 4 * k) if steps is None else steps
    check_count("steps", steps, k)
    product, dtype = _transposed_product(f0, z0), _real_dtype(z0)
    values, residuals = leading_ritz_values(product, _random_directions(z0), k, steps, tol)
    return Eigenvalues(values.to(dtype.to_complex()), residuals.to(dtype))


def contraction_bound(f0: Tensor, z0: Tensor, steps: int = 50) -> Tensor:
    """Spectral norm ||J||_2 per sample: below 1, f is a contraction near z0.

    ||J||_2, the largest singular value, is the Lipschitz constant of f at z0, and bounds the
    spectral radius. The estimate is the square root of the largest Ritz value of J'J, from Lanczos'
    process with full reorthogonalisation, started at the random vector J'u.

    Up to rounding, the estimate approaches ||J||_2 from below. For u uniform on the sphere in D
    dimensions and any J, it is below sqrt(1 - e) ||J||_2 with a probability of at most
    1.648 sqrt(D) exp(-(2 steps - 1) sqrt(e)) (Kuczynski and Wozniakowski 1992, SIAM J. Matrix Anal.
    Appl. 13, 1094). With 50 steps and D = 100 000, at most one estimate in a hundred is more than
    0.6 % too low.

    The products J v are derivatives of u -> J'u, so the backward of f must be differentiable.

    Args:
        steps: number of products with J, and as many with J'; at least 1, and at most D are made.

    Returns:
        (B,), in the dtype of ``z0``, at least float32; NaN for a sample whose Jacobian is not
        finite.

    Raises:
        InputError: f has no double backward.
    """
    _check_pair(f0, z0)
    check_count("steps", steps, 1)
    transposed, u = _transposed_product(f0, z0), _random_directions(z0)
    v = transposed(u)
    product = _product(f0, z0, u, v)
    v = normalise(v)[0]
    *_, hessenberg = arnoldi(lambda v: transposed(product(v)), v, min(steps, v.shape[1]))
    lanczos, finite = only_finite(hessenberg[:, :-1])  # tridiagonal, symmetric
    squared = torch.linalg.eigvalsh(lanczos).amax(dim=1).clamp(min=0)
    return squared.sqrt().where(finite, torch.nan).to(_real_dtype(z0))


def _random_directions(z0: Tensor) -> Tensor:
    """Random unit vectors (B, D)."""
    return normalise(torch.randn_like(z0, dtype=_real_dtype(z0)).reshape(len(z0), -1))[0]


def _real_dtype(z0: Tensor) -> torch.dtype:
    return torch.promote_types(z0.dtype, torch.float32)


def _transposed_product(f0: Tensor, z0: Tensor) -> Map:
    """The function v -> J'v on (B, D)."""

    def product(v: Tensor) -> Tensor:
        vector = v.to(f0.dtype).view(f0.shape)
        return vjp(f0, z0, vector).reshape(len(z0), -1).to(_real_dtype(z0))

    return product


def _product(f0: Tensor, z0: Tensor, u: Tensor, v: Tensor) -> Map:
    """The function x -> J x on (B, D): J is the transposed Jacobian of the linear map u -> J'u.

    It is tested on v = J'u, for which u'(J v) = v'v: autograd may silently treat a backward that is
    not differentiable as a constant.
    """
    reason, cause = "J v does not match J'u", None
    try:
        leaf = torch.zeros_like(f0, requires_grad=True)
        pulled_back = vjp(f0, z0, leaf, create_graph=True)
        if pulled_back.requires_grad:
            product = _transposed_product(pulled_back, leaf)
        else:
            product = torch.zeros_like  # right if f does not depend on z; the test below decides
        image = product(v)
        found, exact = (u * image).sum(dim=1), v.square().sum(dim=1)
        # u is random: u'J v usually has the size ||J v|| / sqrt(D), but may be small by chance.
        usual = torch.linalg.vector_norm(image, dim=1) / u.shape[1] ** 0.5
        # f may compute in bfloat16: 5 % is far above its rounding.
        if not ((found - exact).abs() > 0.05 * (exact + usual)).any():
            return product
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason, cause = str(error).partition("\n")[0], error
    raise InputError(
        "f must be twice differentiable: build it without custom backwards, torch.compile and "
        f"fused attention kernels, or use power_method, which needs none of this ({reason})"
    ) from cause


def _vectors_named(name: str) -> Map:
    check(name in VECTORS, "vectors", name, " or ".join(VECTORS))
    return VECTORS[name]


def _check_pair(f0: Tensor, z0: Tensor) -> None:
    if f0.shape != z0.shape:
        raise InputError(f"f0 has shape {tuple(f0.shape)}, but z0 has {tuple(z0.shape)}")
    if not z0.requires_grad or not f0.requires_grad:
        raise InputError("f0 must be f(z0) of a z0 that requires grad: call z0.requires_grad_()")


def arnoldi(product: Map, v: Tensor, steps: int, *, renew: bool = False) -> Iterator[Tensor]:
    """Arnoldi's process from v (B, D), for m = 1, ..., ``steps`` products with A.

    A V = V H + h w e_m'. The columns of (V, w) are orthonormal and span the Krylov space of v.
    Yields (B, m + 1, m): H in Hessenberg form, and a last row that holds only h. The eigenvalues t
    of H, the Ritz values, approach those of A, the outermost first. For H y = t y with ||y|| = 1,
    x = V y has the residual ||A x - t x|| = |h| |y_m| (Saad, chapter 6).

    If the space of a sample is exhausted (the rest is rounding alone), h and the further columns
    are zero: noise would have Ritz values that may exceed the spectral radius. With ``renew`` the
    sample instead continues from a random direction orthogonal to the space.
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


def leading_ritz_values(product: Map, v: Tensor, k: int, steps: int, tol: float) -> Eigenvalues:
    """:func:`leading_eigenvalues`, from v (B, D)."""
    steps = min(steps, v.shape[1])
    done = torch.zeros(len(v), 1, dtype=torch.bool, device=v.device)
    values = residuals = v.new_zeros(())
    for hessenberg in arnoldi(product, v, steps, renew=True):
        m = hessenberg.shape[2]
        if m < steps and (m < k or m % _CHECK_EVERY):
            continue
        found = ritz_values(hessenberg, k)
        # A sample that is done must not depend on how long the others take.
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
    """Matrices (B, m, m), zero if not finite (LAPACK refuses those); which are finite, (B,)."""
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    return matrices.where(finite[:, None, None], 0.0), finite


def normalise(v: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and norms, of the rows; a zero row stays zero."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / torch.where(norm > 0, norm, 1.0), norm
