"""Krylov methods for affine maps: find z with f(z) = J z + b = z, that is (I - J) z = b.

The adjoint of an equilibrium is such a system. All is per sample: every sample has its own Krylov
space. A :class:`~lib.maps.Affine` map gives products with J directly; of any other f they are
differences of its values.

Within a cycle the recursion of a method knows the residual; at its end f itself is evaluated, and
only such true residuals are reported. ``threshold`` and the budget ``max_nfe`` count evaluations
of f and products with J together; the result tells them apart, as ``nfe`` and ``products``.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lib.maps import Affine
from lib.sample_run import start
from lib.solver_run import check_count, solver_method


@solver_method
def gmres(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    restart: int | None = None,
    **control,
) -> dict:
    """GMRES: of the Krylov space, the point of the least residual (Saad and Schultz 1986).

    Arnoldi's process J V = V H (orthogonalised twice); z = x0 + V c minimises
    ||r_0 - (I - J) V c||, a small least-squares problem that Givens rotations keep solved. One
    product and one stored vector per step. It needs no contraction.

    Args:
        f: affine, (B, ...) to the same shape.
        x0: start, (B, ...) of any rank and floating dtype, finite.
        threshold: evaluations and products at most, that of the last true residual included.
        eps, stop_mode: as for :func:`~lib.anderson.anderson`.
        restart: begin a new Krylov space after so many vectors; None keeps all.
        **control: see :class:`~lib.solver_run.Control`. With stop='sample' each sample takes the
            steps that it needs by itself; a product is of the whole batch all the same.

    Returns:
        The dict that :mod:`lib.solvers` describes.

    Raises:
        InputError: an argument out of range, ``x0`` not finite, or f changing the shape.
    """
    if restart is not None:
        check_count("restart", restart)
    system = System(f, x0, threshold, eps, stop_mode, control)
    while system.goes_on():
        size = min(restart or threshold, system.left - 1, system.x.shape[1])
        system.move(gmres_cycle(system, size))
    return system.result()


def gmres_cycle(system: "System", size: int) -> Tensor:
    """The correction V c after at most ``size`` products, (B, D).

    The small problems are on the host, in float64: one transfer per step brings a column of H. A
    sample that takes no further part has columns of the identity and no right-hand side.
    """
    batch, length = system.x.shape
    rest = system.residual.copy()  # (B,) of the recursion, with a sign
    active = ~system.finished(rest, system.value)
    triangle, right = np.zeros((batch, size, size)), np.zeros((batch, size))
    rotations: list[tuple[np.ndarray, np.ndarray]] = []
    basis = system.x.new_empty(min(size + 1, 16), batch, length)
    basis[0] = _unit(system.g, np.where(active, rest, 0.0))
    for j in range(size):
        if j + 2 > len(basis):
            more = min(len(basis), size + 1 - len(basis))
            basis = torch.cat([basis, basis.new_empty(more, batch, length)])
        image = system.product(basis[j])
        column = _orthogonalise(image, basis[: j + 1]).cpu().numpy()  # (B, j + 2)
        finite = np.isfinite(column).all(1)
        system.lose(active & ~finite)
        active &= finite
        column[~active] = 0.0
        exhausted = column[:, -1] <= 10 * system.rounding * np.linalg.norm(column, axis=1)
        column[exhausted, -1] = 0.0
        basis[j + 1] = _unit(image, column[:, -1])

        column = -column  # of I - J
        column[:, j] += 1.0
        for i, (c, s) in enumerate(rotations):
            upper, lower = column[:, i], column[:, i + 1]
            column[:, i], column[:, i + 1] = c * upper + s * lower, c * lower - s * upper
        radius = np.hypot(column[:, j], column[:, j + 1])
        active &= radius > 0  # else I - J is singular on the space
        safe = np.where(active, radius, 1.0)
        c, s = column[:, j] / safe, column[:, j + 1] / safe
        rotations.append((c, s))
        column[:, j] = safe
        column[~active, :j] = 0.0
        triangle[:, : j + 1, j] = column[:, : j + 1]
        right[:, j] = np.where(active, c * rest, 0.0)
        rest = np.where(active, -s * rest, rest)

        n = j + 1
        weights = np.linalg.solve(triangle[:, :n, :n], right[:, :n, None])[:, :, 0]
        value = system.value if system.moved else np.linalg.norm(weights, axis=1)
        finished = system.finished(np.abs(rest), value)
        active &= ~exhausted
        if system.per_sample:
            active &= ~finished
        elif system.finished_together(rest, value):
            break
        if not active.any() or system.out_of_budget():
            break
    weights = torch.from_numpy(weights).to(basis)[:, None]  # (B, 1, n)
    return torch.bmm(weights, basis[:n].transpose(0, 1))[:, 0]


def _unit(vectors: Tensor, norms: np.ndarray) -> Tensor:
    """Vectors (B, D) over their norms (B,); zero where the norm is."""
    norms = torch.from_numpy(norms).to(vectors)[:, None]
    return torch.where(norms > 0, vectors / torch.where(norms > 0, norms, 1.0), 0.0)


def _orthogonalise(image: Tensor, basis: Tensor) -> Tensor:
    """Take the parts along the basis (k, B, D) out of ``image``, in place.

    Returns the coefficients and the norm of what is left, (B, k + 1) in float64.
    """
    total = 0
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        overlap = torch.bmm(basis.transpose(0, 1), image[:, :, None])  # (B, k, 1)
        image.sub_(torch.bmm(overlap.transpose(1, 2), basis.transpose(0, 1)).squeeze(1))
        total = total + overlap[:, :, 0].double()
    rest = torch.linalg.vector_norm(image, dim=1, keepdim=True)
    return torch.cat([total, rest.double()], dim=1)


@solver_method
def bicgstab(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    **control,
) -> dict:
    """BiCGSTAB (van der Vorst 1992): two products per step, and a handful of vectors in all.

    Where its recursion breaks down, a sample begins anew from where it is. Arguments and result
    are those of :func:`gmres`.
    """
    system = System(f, x0, threshold, eps, stop_mode, control)
    while system.goes_on():
        system.move(_bicgstab_cycle(system))
    return system.result()


def _bicgstab_cycle(system: "System") -> Tensor:
    """The correction of the least residual that the recursion came by, (B, D)."""
    r = system.g.clone()
    shadow, p, rho = r, r, _dot(r, r)
    correction, best = torch.zeros_like(r), torch.zeros_like(r)
    lowest = system.residual.copy()
    active = ~system.finished(lowest, system.value)
    while active.any() and not system.out_of_budget(products=2):
        ap = p - system.product(p)
        alpha = _ratio(rho, _dot(shadow, ap))
        half = r - alpha * ap
        image = half - system.product(half)
        omega = _ratio(_dot(image, half), _dot(image, image))
        rows = torch.from_numpy(active).to(r.device)[:, None]
        correction = correction + torch.where(rows, alpha * p + omega * half, 0.0)
        r = torch.where(rows, half - omega * image, r)

        before, rho = rho, _dot(shadow, r)
        p = r + _ratio(rho * alpha, before * omega) * (p - omega * ap)
        norms = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        shadow_norms = torch.linalg.vector_norm(shadow, dim=1, keepdim=True)
        broken = rho.abs() <= system.rounding * norms * shadow_norms
        shadow, p = torch.where(broken, r, shadow), torch.where(broken, r, p)
        rho = torch.where(broken, norms.square(), rho)

        both = torch.stack([norms[:, 0], torch.linalg.vector_norm(correction, dim=1)])
        residual, length = both.double().cpu().numpy()
        finite = np.isfinite(residual)
        system.lose(active & ~finite)
        active &= finite
        better = active & (residual < lowest)
        best = torch.where(torch.from_numpy(better).to(r.device)[:, None], correction, best)
        lowest = np.where(better, residual, lowest)
        value = system.value if system.moved else length
        if system.per_sample:
            active &= ~system.finished(residual, value)
        elif system.finished_together(residual[~system.run.lost], value[~system.run.lost]):
            break
        active &= residual > 0
    return best


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, zero where b is."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)


class System:
    """A linear system on its way: the point x (B, D), g = f(x) - x, and when to stop.

    ``residual`` and ``value`` (B,) are ||g|| and ||f(x)||, on the host.
    """

    def __init__(self, f, x0: Tensor, threshold: int, eps: float, stop_mode: str, control: dict):
        self.run = start(f, x0, threshold, eps, stop_mode, control, shrinks=False)
        self.per_sample = self.run.control.stop == "sample"
        self.f, self.rounding = f, torch.finfo(self.run.work_dtype).eps
        self.moved = bool((self.run.x0 != 0).any())  # else ||f(x)|| is that of the correction
        self._at_zero: Tensor | None = None
        self.x, self.g = self.run.x0, torch.zeros_like(self.run.x0)
        self._stuck = False
        self._evaluate(self.x)

    def _evaluate(self, x: Tensor) -> None:
        self.x, fx, self.g = self.run.evaluate(x)
        norms = [torch.linalg.vector_norm(v, dim=1) for v in (self.g, fx)]
        self.residual, self.value = torch.stack(norms).double().cpu().numpy()

    def move(self, correction: Tensor) -> None:
        """Go to x + correction, and find the true residual there."""
        before = self.residual
        self._evaluate(self.x + correction)
        self.moved, self._stuck = True, not (self.residual < before).any()

    def product(self, v: Tensor) -> Tensor:
        """J v, (B, D), a tensor of the caller's own."""
        run = self.run
        run.products += 1
        shaped = v.to(run.dtype).view(run.shape)
        if isinstance(self.f, Affine):
            image = self.f.product(shaped)
        else:
            if self._at_zero is None:
                run.products += 1
                self._at_zero = self.f(torch.zeros_like(shaped))
            image = self.f(shaped) - self._at_zero
        return image.reshape(v.shape).to(v.dtype, copy=True)

    def lose(self, samples: np.ndarray) -> None:
        """Give up samples (B,) whose products are not finite; they rest at their best point."""
        self.run.lose(samples)

    # ---- when to stop --------------------------------------------------------------------------

    @property
    def left(self) -> int:
        run = self.run
        return min(run.threshold, run.control.max_nfe or run.threshold) - run.nfe - run.products

    def out_of_budget(self, products: int = 1) -> bool:
        """Whether so many products and the evaluation after them are too many."""
        return self.left < products + 1 or self.run.reason in ("max_nfe", "max_seconds")

    def goes_on(self) -> bool:
        """Whether another cycle is needed, possible, and of use."""
        done = self.finished(self.residual, self.value)  # what is lost has a residual of zero
        return not (self.run.stopped or self._stuck or done.all() or self.out_of_budget())

    def finished(self, residual: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Which samples need not go on, by ||g|| and ||f(x)|| (B,).

        In a batch that stops together, those alone that cannot fall further.
        """
        if not self.per_sample:
            return residual == 0
        return self._small(residual, value)

    def finished_together(self, residual: np.ndarray, value: np.ndarray) -> bool:
        return bool(self._small(np.linalg.norm(residual), np.linalg.norm(value)))

    def _small(self, residual, value):
        limit = self.run.eps if self.run.stop_mode == "abs" else self.run.eps * value
        return (residual < limit) | (residual < self.run.control.floor * value) | (residual == 0)

    def result(self) -> dict:
        """What the solver returns."""
        return self.run.result()
