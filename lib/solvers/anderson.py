"""Anderson acceleration."""

import numpy as np
import torch
from torch import Tensor

from lib.errors import check, check_count, check_number
from lib.solvers.maps import Map
from lib.solvers.norms import mask_of, products
from lib.solvers.sample_solve import start
from lib.solvers.solve import solver_method

_CUT = 0.01  # factor on beta after each step that leads far out


@solver_method
def anderson(
    f: Map,
    x0: Tensor,
    m: int = 6,
    lam: float | None = None,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    beta: float = 1.0,
    *,
    restart: bool = False,
    **control,
) -> dict:
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011), as used by DEQ models.

    The first step is z_1 = f(z_0). Then, with the residuals g_i = f(z_i) - z_i of the last
    n = min(m, k) points as the rows of G,

        a = argmin ||sum a_i g_i||^2 + ridge,  sum a_i = 1
        z_k = beta sum a_i f(z_i) + (1 - beta) sum a_i z_i

    The weights a solve the system [[0, 1'], [1, G G' + lam I]] [nu; a] = [1; 0], per sample.

    Args:
        f: maps (B, ...) to the same shape. It returns a new tensor at every call.
        x0: initial guess, finite, (B, ...) of any rank and any floating dtype.
        m: number of past points to mix (1 is plain iteration). Six are enough for contractions and
            similar maps. If I - J has eigenvalues on both sides of zero (Broyden's tridiagonal and
            banded systems, adjoints with a spectral radius above 1), six stall; twelve solve, and
            so does ``restart``.
        lam: absolute ridge, as published (1e-4 there). Near the solution it swamps the system.
            The default None takes a ridge of a few rounding errors relative to each ||g_i||^2
            (1.2e-6 in float32, 1e-13 in float64).
        threshold: maximum number of evaluations of f, including the two before the first mixing.
        eps: stop once the residual over the batch is below this.
        stop_mode: 'abs' for ||f(z) - z||, 'rel' for ||f(z) - z|| / ||f(z)||.
        beta: damping; 1 uses the f(z_i) alone. Each step that leads far out
            (:class:`~lib.solvers.solve.Divergence`) cuts beta to a hundredth for that sample.
        restart: whenever m points are stored, forget them all and restart from the mixed point,
            instead of replacing the oldest point.
        **control: see :class:`~lib.solvers.arguments.Control`.

    Returns:
        The dict that :mod:`lib.solvers` describes.

    Raises:
        InputError: an argument is out of range, ``x0`` is not finite, or f changes the shape.
    """
    check_count("m", m)
    if lam is not None:
        check_number("lam", lam)
    check_number("beta", beta, positive=True)
    check(isinstance(restart, bool), "restart", restart, "True or False")
    solve = start(f, x0, threshold, eps, stop_mode, control)
    past = _AndersonWindow(solve.x0, m=min(m, threshold), lam=lam, beta=beta)
    _, fx, gx = solve.evaluate(solve.x0, out=past.residual[0])
    while not solve.stopped and solve.nfe < threshold:
        newest, n = (solve.nfe - 1) % past.m, min(solve.nfe, past.m)
        if solve.kept is not None:
            past.select(solve.kept)
        if restart:
            n = newest + 1
            if n == 1:
                past.forget()
        if solve.far.any():
            past.damp(solve.far)
        past.keep_value(newest, fx, gx)
        past.renew_gram(newest, n, solve.wide)
        # The first step is plain. clone(): the iterate must not alias f's value or the window.
        x = fx.clone() if solve.nfe == 1 else past.combination(newest, n)
        _, fx, gx = solve.evaluate(x, out=past.residual[solve.nfe % past.m])
    return solve.result()


class _AndersonWindow:
    """The last m points: residuals g_i, values h_i = beta f(z_i) + (1 - beta) z_i, Gram matrix.

    The caller writes the m tensors (B, D) of ``residual`` in turn.
    """

    _ABSENT = 1e300  # ||g||^2 in an empty slot: its weight vanishes

    def __init__(self, like: Tensor, m: int, lam: float | None, beta: float):
        batch, size = like.shape
        self._beta: float | Tensor = beta  # a tensor (B, 1) once it differs between samples
        self.m = m
        self._residuals = like.new_empty(m, batch, size)
        self._values = like.new_empty(m, batch, size)
        eye = torch.eye(m, dtype=torch.float64, device=like.device)
        self._absent = self._ABSENT * eye
        self._gram = self._absent.repeat(batch, 1, 1)
        self._ones = eye.new_ones(batch, m, 1)
        # Above the rounding errors of the inner products: the system stays positive definite.
        rounding = max(10 * torch.finfo(like.dtype).eps, 1e-13)
        self._scale = 1 + rounding * eye
        self._shift = None if lam is None else lam * eye
        self._unit = eye.unbind()
        self._unbind()

    def _unbind(self) -> None:
        # For small states indexing costs as much as the inner products.
        self.residual, self.value = self._residuals.unbind(), self._values.unbind()
        self._row, self._column = self._gram.unbind(1), self._gram.unbind(2)

    def select(self, rows: Tensor) -> None:
        self._residuals, self._values = self._residuals[:, rows], self._values[:, rows]
        self._gram, self._ones = self._gram[rows], self._ones[rows]
        if isinstance(self._beta, Tensor):
            self._beta = self._beta[rows]
        self._unbind()

    def keep_value(self, newest: int, fx: Tensor, gx: Tensor) -> None:
        """Write h into slot ``newest``."""
        plain = not isinstance(self._beta, Tensor) and self._beta == 1
        self.value[newest].copy_(fx if plain else fx - (1 - self._beta) * gx)

    def damp(self, samples: np.ndarray) -> None:
        """Cut beta for ``samples`` (B,), and adapt their stored values h_i."""
        mask = mask_of(samples, self._gram)
        cut = self._values.new_ones(mask.shape).masked_fill_(mask, _CUT)
        after = self._beta * cut
        self._values -= (self._beta - after) * self._residuals
        self._beta = after

    def forget(self) -> None:
        self._gram.copy_(self._absent)

    def renew_gram(self, newest: int, n: int, wide: bool) -> None:
        """Update the inner products of residual ``newest`` with the n stored ones."""
        residuals, row, column = self._residuals, self._row[newest], self._column[newest]
        if n < self.m:
            residuals, row, column = residuals[:n], row[:, :n], column[:, :n]
        row_products = products(self.residual[newest][None], residuals, wide).squeeze(1)  # (B, n)
        row.copy_(row_products)
        column.copy_(row_products)

    def combination(self, newest: int, n: int) -> Tensor:
        """sum a_i h_i over the n stored points, (B, D)."""
        weights, values = self._weights(newest), self._values
        if n < self.m:
            weights, values = weights[:, :, :n], values[:n]
        return torch.bmm(weights.to(values.dtype), values.transpose(0, 1)).squeeze(1)

    def _weights(self, newest: int) -> Tensor:
        """Weights a (B, 1, m) that sum to one and minimise a' (G + ridge) a; G is the Gram matrix.

        Cholesky's factorisation is accurate however much the lengths of the residuals differ. Where
        it fails (an absolute ridge is too small, or float64 does not hold the squares), a sample
        takes the plain step from the newest point.
        """
        system = self._gram * self._scale if self._shift is None else self._gram + self._shift
        factor, failed = torch.linalg.cholesky_ex(system)
        solution = torch.cholesky_solve(self._ones, factor).mT  # (G + ridge) a = 1, up to a factor
        total = solution.sum(2, keepdim=True)
        usable = total * 0 == failed.view(-1, 1, 1)  # 0 * inf and 0 * NaN are NaN
        return torch.where(usable, solution / total, self._unit[newest])
