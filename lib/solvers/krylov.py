"""Krylov methods for affine maps: find z with f(z) = J z + b = z, that is (I - J) z = b.

The adjoint of an equilibrium is such a system. Each sample has its own Krylov space. A
:class:`~lib.solvers.maps.Affine` map gives products with J. For any other f, a product is a
difference of two values of f and costs one evaluation.

Within a cycle, the residual comes from the recursion of the method. At its end f itself is
evaluated; only these true residuals are reported. ``nfe`` counts these evaluations, with the one at
the start; ``threshold`` and ``max_nfe`` limit the sum of ``nfe`` and ``products``. The solve ends
as 'stalled' if a cycle lowers no residual, by rounding or because I - J is singular.
"""

import numpy as np
import torch
from torch import Tensor

from lib.errors import check_count
from lib.solvers.maps import Affine, Map
from lib.solvers.norms import TINY, mask_of, norms, orthogonalise, scaled_norms, to_device
from lib.solvers.sample_solve import start
from lib.solvers.solve import Solve, solver_method


@solver_method
def gmres(
    f: Map,
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    restart: int | None = None,
    **control,
) -> dict:
    """GMRES: the point of the Krylov space with the least residual (Saad and Schultz 1986).

    Arnoldi's process (orthogonalised twice) gives J V = V H. The point z = x0 + V c minimises
    ||r_0 - (I - J) V c||, a small least-squares problem solved by Givens rotations. A step costs
    one product and one stored vector. f need not be a contraction.

    Args:
        f: an affine map of (B, ...) to the same shape.
        x0, eps, stop_mode: as for :func:`~lib.solvers.anderson.anderson`.
        threshold: maximum number of evaluations and products together, including the evaluation
            for the last true residual.
        restart: start a new Krylov space after this many vectors; None keeps all vectors.
        **control: see :class:`~lib.solvers.arguments.Control`. With stop='sample' each sample takes
            as many steps as it needs; a product still covers the whole batch.

    Returns:
        The dict that :mod:`lib.solvers` describes.

    Raises:
        InputError: as for :func:`~lib.solvers.anderson.anderson`.
    """
    if restart is not None:
        check_count("restart", restart)
    system = System(f, x0, threshold, eps, stop_mode, control)
    while system.goes_on(products=1):
        size = min(restart or threshold, system.solve.left - 1, system.x.shape[1])
        system.move(*gmres_cycle(system, system.g, size, system.x))
    return system.solve.result()


def gmres_cycle(system, g: Tensor, size: int, x: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
    """One cycle of GMRES, of at most ``size`` products, from x (B, D) with the residual g there.

    One transfer per step brings a column of H to the host. ``system`` has ``product``, ``enough``
    and ``solve`` as :class:`System`; x None is zero.

    Returns:
        The correction V c (B, D), and the samples (B,) whose residual it lowers.
    """
    batch, length = g.shape
    first = norms(g)  # (B,)
    active, small = (first > 0) & ~system.solve.resting, _LeastSquares(first, size)
    along, chosen = np.zeros((2, batch, size))  # V'x; c of the correction to return
    square = np.zeros(batch) if x is None else norms(x) ** 2
    best = _Best(first, np.sqrt(square), g)
    basis = g.new_empty(min(size + 1, 16), batch, length)
    basis[0] = _unit(g, np.where(active, first, 0.0))
    n = 0  # products so far
    for j in range(size):
        n = j + 1
        if n + 1 > len(basis):
            more = min(len(basis), size + 1 - len(basis))
            basis = torch.cat([basis, basis.new_empty(more, batch, length)])
        image = system.product(basis[j])
        image, column = orthogonalise(image, basis[:n].transpose(0, 1))
        extra = [_norm(image)] if x is None else [_norm(image), _dot(basis[j], x)]
        column = torch.cat([column, *(t.double() for t in extra)], dim=1)
        column = column.cpu().numpy()  # (B, n + 1), and V'x at the end if x is given
        if x is not None:
            column, along[:, j] = column[:, :-1], column[:, -1]
        fails = active & ~np.isfinite(column).all(1)
        system.solve.lose(fails)
        active &= ~fails
        column = np.where(active[:, None], column, 0.0)
        exhausted = column[:, n] <= best.rounding * (1 + np.linalg.norm(column, axis=1))
        column[exhausted, n] = 0.0
        basis[n] = _unit(image, column[:, n])

        column = -column  # from J to I - J
        column[:, j] += 1.0
        weights, active = small.add(column, active)
        squares = square + (weights * (weights + 2 * along[:, :n])).sum(1)
        value = np.sqrt(np.maximum(squares, 0.0))
        better = best.offer(active, np.abs(small.rest), np.linalg.norm(weights, axis=1), value)
        chosen[better, :n] = weights[better]
        active &= ~exhausted & ~system.enough(best.residual, best.value)
        if not active.any() or system.solve.stopped:
            break
    weights = to_device(chosen[:, None, :n], basis)  # (B, 1, n)
    return torch.bmm(weights, basis[:n].transpose(0, 1))[:, 0], best.improved


class _LeastSquares:
    """min ||r_0 - (I - J) V c|| for each sample, in float64.

    A sample that takes no further part gets columns of the identity and a right-hand side of zero.
    """

    def __init__(self, first: np.ndarray, size: int):
        self.rest = first.copy()  # the least residual so far, with a sign, (B,)
        self._triangle = np.zeros((len(first), size, size))
        self._right = np.zeros((len(first), size))
        self._rotations: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, column: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add a column (B, n + 1) of V'(I - J)V, which is overwritten; return c (B, n).

        Also those of the ``active`` samples whose I - J is not singular on the space.
        """
        n = column.shape[1] - 1
        j = n - 1
        for i, (c, s) in enumerate(self._rotations):
            upper, lower = column[:, i], column[:, i + 1]
            column[:, i], column[:, i + 1] = c * upper + s * lower, c * lower - s * upper
        radius = np.hypot(column[:, j], column[:, n])
        active = active & (radius > TINY)
        c, s = (column[:, i] / np.where(active, radius, 1.0) for i in (j, n))
        self._rotations.append((c, s))
        column[:, j] = radius
        self._triangle[:, :n, j] = np.where(active[:, None], column[:, :n], np.eye(n)[j])
        self._right[:, j] = np.where(active, c * self.rest, 0.0)
        self.rest = np.where(active, -s * self.rest, self.rest)
        triangle, right = self._triangle[:, :n, :n], self._right[:, :n, None]
        found = torch.linalg.solve_triangular(
            torch.from_numpy(triangle), torch.from_numpy(right), upper=True
        )
        return found[:, :, 0].numpy(), active


class _Best:
    """The best point of a cycle for each sample: ``residual`` ||g||, ``value`` ||x + correction||.

    If I - J is almost singular, points run far away for a small gain in the residual. So a point a
    thousand times as far away counts only if it halves the residual; and its rounding error must be
    below the lowest residual so far. All arrays are (B,).
    """

    def __init__(self, residual: np.ndarray, value: np.ndarray, like: Tensor):
        self.rounding = 10 * torch.finfo(like.dtype).eps
        self.residual, self.value = residual.copy(), value.copy()
        self._first = self._level = self._far = residual  # at the last halving

    def offer(
        self, samples: np.ndarray, residual: np.ndarray, length: np.ndarray, value: np.ndarray
    ) -> np.ndarray:
        """Offer ``samples`` a point each, with ``length`` ||correction||; return who accepts."""
        halved = residual < 0.5 * self._level
        better = samples & (np.maximum(residual, self.rounding * length) < self.residual)
        better &= halved | (length <= 1000 * self._far)
        self.residual = np.where(better, residual, self.residual)
        self.value = np.where(better, value, self.value)
        self._level = np.where(better & halved, residual, self._level)
        self._far = np.where(better & halved, np.maximum(length, self._far), self._far)
        return better

    @property
    def improved(self) -> np.ndarray:
        """The samples whose residual the cycle lowers by more than 0.1 per cent."""
        return self.residual < 0.999 * self._first


def _unit(vectors: Tensor, norms: np.ndarray) -> Tensor:
    """Vectors divided by their norms (B,); zero where the norm is zero."""
    return _ratio(vectors, to_device(norms, vectors)[:, None])


@solver_method
def bicgstab(
    f: Map,
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    **control,
) -> dict:
    """BiCGSTAB (van der Vorst 1992): two products per step, and a handful of vectors in all.

    The stabilising steps are the longer ones of Sleijpen and van der Vorst (1995). They change
    nothing if f is a contraction; if not, they help, even for a skew-symmetric I - J. If the
    recursion breaks down for a sample, it restarts at the current point. Arguments and result are
    as for :func:`gmres`, without ``restart``.
    """
    system = System(f, x0, threshold, eps, stop_mode, control)
    while system.goes_on(products=2):
        system.move(*_bicgstab_cycle(system))
    return system.solve.result()


def _bicgstab_cycle(system: "System") -> tuple[Tensor, np.ndarray]:
    """One cycle: the best correction (B, D), and the samples (B,) whose residual it lowers."""
    solve, first = system.solve, norms(system.g)
    # Divide by the size of the residual: squares stay in range. A power of two rounds nothing.
    limits = torch.finfo(system.g.dtype)
    size = np.exp2(np.floor(np.log2(np.clip(first, limits.tiny, limits.max / 4))))
    unit = to_device(size, system.g)[:, None]
    r, x = system.g / unit, system.x / unit
    correction, chosen = torch.zeros_like(r), torch.zeros_like(r)
    best, active = _Best(first, norms(system.x), r), (first > 0) & ~solve.resting
    going = mask_of(active, r)
    shadow, p, rho = r, torch.where(going, r, 0.0), _dot(r, r)
    while active.any() and solve.affords(3) and not solve.stopped:
        ap, finite = _finite(p - system.product(p))
        sizes = _norm(shadow) * (_norm(p) + _norm(ap))
        alpha = _ratio(rho, _dot(shadow, ap), best.rounding * sizes)
        half = torch.where(going, r - alpha * ap, 0.0)
        image, finite_too = _finite(half - system.product(half))
        cosine = _ratio(_dot(image, half), _norm(image) * _norm(half))
        # Lengthen a short step beyond the least residual: a vanishing omega ends the recursion.
        sign = torch.where(cosine < -best.rounding, -1.0, 1.0)
        omega = sign * cosine.abs().clamp(min=0.7) * _ratio(_norm(half), _norm(image))
        correction = torch.where(going, correction + alpha * p + omega * half, correction)
        r = torch.where(going, half - omega * image, r)

        before, rho = rho, _dot(shadow, r)
        p = r + _ratio(rho * alpha, before * omega) * (p - omega * ap)
        broken = rho.abs() <= best.rounding * _norm(r) * _norm(shadow)
        shadow, p = torch.where(broken, r, shadow), torch.where(broken, r, p)
        rho = torch.where(broken, _dot(r, r), rho)

        moved = (alpha != 0) | (omega != 0)
        parts = [_norm(r), _norm(correction), _norm(x + correction)]
        parts += [finite & finite_too, moved]
        found = torch.cat([part.double() for part in parts], dim=1).T.cpu().numpy()
        residual, length, value = found[:3] * size
        fails = active & ~(np.isfinite(residual + length) & (found[3] > 0))
        solve.lose(fails)
        active &= ~fails
        better = best.offer(active, residual, length, value)
        chosen = torch.where(mask_of(better, r), correction, chosen)
        # A recursion whose residual has grown this much has lost all digits of the best residual.
        active &= (found[4] > 0) & (residual > 0) & (best.rounding * residual < best.residual)
        active &= ~system.enough(best.residual, best.value)
        going = mask_of(active, r)
        p = torch.where(going, p, 0.0)
    return chosen * unit, best.improved


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=1, keepdim=True)


def _finite(a: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, D) with zeros for samples that are not finite, and the mask (B, 1) of finite ones."""
    finite = torch.isfinite(_norm(a))
    return torch.where(finite, a, 0.0), finite


def _ratio(a: Tensor, b: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """a / b; zero where |b| <= ``least``."""
    fits = b.abs() > least
    return torch.where(fits, a / torch.where(fits, b, 1.0), 0.0)


class System:
    """State of a linear solve: the point x (B, D), f(x), g = f(x) - x."""

    def __init__(self, f, x0: Tensor, threshold: int, eps: float, stop_mode: str, control: dict):
        self.solve = start(f, x0, threshold, eps, stop_mode, control, needs_all=True)
        self.f = f
        self.x, self.fx, self.g = self.solve.evaluate(self.solve.x0)

    def move(self, correction: Tensor, improved: np.ndarray) -> None:
        """Move the samples ``improved`` (B,) to x + correction, and evaluate f there.

        Samples whose true residual does not fall are noted as stalled.
        """
        if improved.any() and not self.solve.resting.all():
            before, moves = norms(self.g), mask_of(improved, correction)
            x = self.x + torch.where(moves, correction, 0.0)
            self.x, self.fx, self.g = self.solve.evaluate(x)
            improved = norms(self.g) < before
        self.solve.stall(~improved)

    def product(self, v: Tensor) -> Tensor:
        """J v, (B, D)."""
        if isinstance(self.f, Affine):
            return multiply(self.solve, self.f.product, v)
        # Scale v to the size of x and f(x), so that the difference keeps its digits.
        sizes = [scaled_norms(point).to(v)[:, None] for point in (self.x, self.fx)]
        scale = _ratio(torch.maximum(*sizes), _norm(v))
        scale = torch.where(scale > 0, scale, 1.0)
        value = multiply(self.solve, self.f, self.x + scale * v)
        return (value - self.fx) / scale

    def goes_on(self, products: int) -> bool:
        """Whether another cycle is needed and affordable; a step takes ``products``."""
        return not self.solve.stopped and self.solve.affords(products + 1)

    def enough(self, residual: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The samples (B,) that need no further step in this cycle.

        With stop='batch' all or only those with a residual of zero. ``residual`` and ``value`` (B,)
        are ||g|| and ||x|| at the best point, the latter for ||f(x)|| = ||x + g||.
        """
        if self.solve.control.stop == "sample":
            return self._small(residual, value)
        counts = ~self.solve.lost
        together = self._small(*(np.linalg.norm(v[counts]) for v in (residual, value)))
        return together | (residual == 0)

    def _small(self, residual, value):
        limit = self.solve.eps if self.solve.stop_mode == "abs" else self.solve.eps * value
        return (residual < limit) | (residual < self.solve.control.floor * value) | (residual == 0)


def multiply(solve: Solve, product: Map, v: Tensor) -> Tensor:
    """product(v) for v (B, D) in the working dtype, as a new tensor; counts one product."""
    solve.products += 1
    image = product(v.to(solve.dtype).view(solve.shape))
    return image.reshape(v.shape).to(v.dtype, copy=True)
