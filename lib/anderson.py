"""Anderson acceleration."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lib.host import to_device
from lib.inner_products import products
from lib.sample_run import start
from lib.solver_run import check, check_count, check_number, solver_method

_CUT = 0.01  # of beta, by each step that leads far out


@solver_method
def anderson(
    f: Callable[[Tensor], Tensor],
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

    z_1 = f(z_0); then, with G the residuals g_i = f(z_i) - z_i of the last n = min(m, k) points,

        a = argmin ||sum a_i g_i||^2 + ridge,  sum a_i = 1
        z_k = beta sum a_i f(z_i) + (1 - beta) sum a_i z_i

    which is the system [[0, 1'], [1, G G' + lam I]] [nu; a] = [1; 0], solved per sample.

    Args:
        f: maps (B, ...) to the same shape, into a tensor of its own at every call.
        x0: start, (B, ...) of any rank and floating dtype, finite.
        m: number of past points that are mixed, at least 1 (1 is plain iteration). Six are enough
            for contractions and their like; where I - J has eigenvalues on both sides of zero
            (Broyden's tridiagonal and banded systems, adjoints of a spectral radius above 1) they
            stall, and twelve, or ``restart``, solve.
        lam: absolute ridge, as published (1e-4 there). It swamps the system near the solution,
            so the default None takes a ridge of a few rounding errors relative to each ||g_i||^2
            (1.2e-6 in float32, 1e-13 in float64).
        threshold: evaluations of f at most, the two before the first mixing included.
        eps: stop once the residual over the batch is below this.
        stop_mode: 'abs' for ||f(z) - z||, 'rel' for ||f(z) - z|| / ||f(z)||.
        beta: damping; 1 uses the f(z_i) alone. It is cut to a hundredth, for a sample's own mixing,
            where a step has led far out (:mod:`lib.divergence`).
        restart: forget all points whenever m are stored, and begin anew from the mixed point,
            instead of replacing the oldest one.
        **control: see :class:`~lib.solver_run.Control`.

    Returns:
        The dict that the module's docstring describes.

    Raises:
        InputError: an argument out of range, ``x0`` not finite, or f changing the shape.
    """
    check_count("m", m)
    if lam is not None:
        check_number("lam", lam)
    check_number("beta", beta, positive=True)
    check(isinstance(restart, bool), "restart", restart, "True or False")
    run = start(f, x0, threshold, eps, stop_mode, control)
    past = _AndersonWindow(run.x0, m=min(m, threshold), lam=lam, beta=beta)
    _, fx, gx = run.evaluate(run.x0, out=past.residual[0])
    while not run.stopped and run.nfe < threshold:
        newest, n = (run.nfe - 1) % past.m, min(run.nfe, past.m)
        if run.kept is not None:
            past.select(run.kept)
        if restart:
            n = newest + 1
            if n == 1:
                past.forget()
        if run.far.any():
            past.damp(run.far)
        past.keep_value(newest, fx, gx)
        past.renew_gram(newest, n, run.wide)
        # At first a plain step, into a tensor that is neither the caller's nor the window's.
        x = fx.clone() if run.nfe == 1 else past.combination(newest, n)
        _, fx, gx = run.evaluate(x, out=past.residual[run.nfe % past.m])
    return run.result()


class _AndersonWindow:
    """The last m points: residuals g_i, values h_i = beta f(z_i) + (1 - beta) z_i, Gram matrix.

    ``residual``, m tensors (B, D), are written by the caller, in turn.
    """

    _ABSENT = 1e300  # ||g||^2 of a point that is not there yet, so that it gets no weight

    def __init__(self, like: Tensor, m: int, lam: float | None, beta: float):
        batch, size = like.shape
        self._beta: float | Tensor = beta  # (B, 1), once some samples have their own
        self.m = m
        self._residuals = like.new_empty(m, batch, size)
        self._values = like.new_empty(m, batch, size)
        eye = torch.eye(m, dtype=torch.float64, device=like.device)
        self._absent = self._ABSENT * eye
        self._gram = self._absent.repeat(batch, 1, 1)
        self._ones = eye.new_ones(batch, m, 1)
        # Relative: above the rounding errors of the products, so that the system stays positive
        # definite.
        rounding = max(10 * torch.finfo(like.dtype).eps, 1e-13)
        self._scale = 1 + rounding * eye if lam is None else None
        self._shift = None if lam is None else lam * eye
        self._unit = eye.unbind()
        self._unbind()

    def _unbind(self) -> None:
        # Once: at small states indexing costs as much as the products.
        self.residual, self.value = self._residuals.unbind(), self._values.unbind()
        self._row, self._column = self._gram.unbind(1), self._gram.unbind(2)

    def select(self, rows: Tensor) -> None:
        """Go on with these samples alone."""
        self._residuals, self._values = self._residuals[:, rows], self._values[:, rows]
        self._gram, self._ones = self._gram[rows], self._ones[rows]
        if isinstance(self._beta, Tensor):
            self._beta = self._beta[rows]
        self._unbind()

    def keep_value(self, newest: int, fx: Tensor, gx: Tensor) -> None:
        """Write h = beta f(x) + (1 - beta) x."""
        plain = not isinstance(self._beta, Tensor) and self._beta == 1
        self.value[newest].copy_(fx if plain else fx - (1 - self._beta) * gx)

    def damp(self, samples: np.ndarray) -> None:
        """Cut beta to a hundredth for samples (B,), for the points that are stored as well."""
        mask = to_device(samples, self._gram.device)[:, None]
        cut = self._values.new_ones(mask.shape).masked_fill_(mask, _CUT)
        after = self._beta * cut
        self._values -= (self._beta - after) * self._residuals
        self._beta = after

    def forget(self) -> None:
        """Drop all points."""
        self._gram.copy_(self._absent)

    def renew_gram(self, newest: int, n: int, wide: bool) -> None:
        """Products of the residual ``newest`` with those of the n points there are."""
        residuals, row, column = self._residuals, self._row[newest], self._column[newest]
        if n < self.m:
            residuals, row, column = residuals[:n], row[:, :n], column[:, :n]
        row_products = products(self.residual[newest][None], residuals, wide).squeeze(1)  # (B, n)
        row.copy_(row_products)
        column.copy_(row_products)

    def combination(self, newest: int, n: int) -> Tensor:
        """sum a_i h_i over the n points there are, (B, D)."""
        weights, values = self._weights(newest), self._values
        if n < self.m:
            weights, values = weights[:, :, :n], values[:n]
        return torch.bmm(weights.to(values.dtype), values.transpose(0, 1)).squeeze(1)

    def _weights(self, newest: int) -> Tensor:
        """Weights a (B, 1, m), summing to one, that minimise a' (G + ridge) a.

        By Cholesky factors, whose accuracy does not depend on how different the lengths of the
        residuals are. A sample without them (an absolute ridge that is too small, or squares
        that float64 does not hold) takes the plain step from the newest point.
        """
        system = self._gram * self._scale if self._shift is None else self._gram + self._shift
        factor, failed = torch.linalg.cholesky_ex(system)
        solution = torch.cholesky_solve(self._ones, factor).mT  # K a = 1 up to a factor
        total = solution.sum(2, keepdim=True)
        usable = (failed.view(-1, 1, 1) == 0) & torch.isfinite(total)
        return torch.where(usable, solution / total, self._unit[newest])
