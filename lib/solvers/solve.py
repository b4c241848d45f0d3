"""One solve, for all methods: evaluate f, keep the best iterate, decide when to stop."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.errors import check_count, check_number
from lib.solvers.arguments import Control, check_finite, check_state, check_stop_mode, checked_value
from lib.solvers.maps import transformed
from lib.solvers.norms import (
    corrected_norms,
    least_norm,
    mask_of,
    relative,
    to_device,
    total,
    totals,
)
from lib.solvers.precision import full_products, in_context, same_autocast
from lib.solvers.transforms import outside_of_compiler, refuse_transforms

FAR, HIGHS = 1e6, 5  # see Divergence


@dataclass
class Best:
    """A best iterate: of the whole batch, or of each sample by itself."""

    x: Tensor  # (B, D)
    residual: np.ndarray  # of each sample in ``stop_mode``, (B,)
    norms: np.ndarray  # of g = f(x) - x and of f(x), (2, B)
    step: np.ndarray  # index in the traces, one for all or (B,)
    total: tuple[float, float] = (math.inf, math.inf)  # the batch's residual, 'abs' and 'rel'


class Solve:
    """One solve of z = f(z) from ``x0``; made by :func:`~lib.solvers.sample_solve.start`.

    Points are (B, D) tensors in the working dtype: that of ``x0``, or float32 if ``x0`` is in half
    precision, whose inner products are too inaccurate. f sees the shape and dtype of ``x0``.

    Every ``check_every`` evaluations, one transfer brings the norms to the host, to be judged: on
    the device, a dozen kernels on a few numbers would cost more than the norms.
    """

    def __init__(
        self,
        f: Callable,
        x0: Tensor,
        threshold: int,
        eps: float,
        stop_mode: str,
        control: Control,
    ):
        check_count("threshold", threshold)
        check_number("eps", eps)
        check_stop_mode(stop_mode)
        self.f = f
        self.shape, self.dtype, self.device = x0.shape, x0.dtype, x0.device
        self.threshold, self.eps, self.stop_mode = threshold, float(eps), stop_mode
        self.control = control
        self._max_nfe = math.inf if control.max_nfe is None else control.max_nfe
        self._start = time.perf_counter()
        self.work_dtype = torch.promote_types(x0.dtype, torch.float32)
        self.x0 = x0.detach().reshape(len(x0), -1).to(self.work_dtype)  # (B, D)
        self.nfe = self.products = 0  # evaluations of f; products with its Jacobian
        self.kept: Tensor | None = None  # see SampleSolve
        self.abs_trace: list[float] = []
        self.rel_trace: list[float] = []
        unknown = np.full((3, len(x0)), math.inf)
        self.best = Best(self.x0, unknown[0], unknown[1:], np.asarray(0))
        # Each sample's best finite iterate: its point if f is not finite, and with best='sample'.
        self.own = replace(self.best, step=np.zeros(len(x0), dtype=np.int64))
        self.wide = False  # whether inner products of residuals may leave the range of float32
        self._least = least_norm(self.x0)
        # Samples on which f was not finite: on the host, and on the device if there are any.
        self.lost, self.lost_mask = np.zeros(len(x0), dtype=bool), None
        self.converged = self.diverged = self.at_floor = self.stalled = False
        self._exhausted = ""  # the limit that the solve ran into, as a reason
        rounding = torch.finfo(self.work_dtype).eps
        self._divergence, self._samples = Divergence(1, rounding), Divergence(len(x0), rounding)
        self.far = self._samples.far  # samples whose newest point is far out, (B,)
        self._borrowed = True  # the best iterate may be another's tensor: do not write to it
        self._pending: list[Tensor] = []  # points not yet judged; _norms holds their norms
        self._norms = self.x0.new_empty(min(control.check_every, threshold + 1), 2, len(x0))
        self._slots = [norms.unbind() for norms in self._norms]

    @property
    def stopped(self) -> bool:
        """Whether the solve ends here for a reason other than the threshold.

        Ask after an evaluation: before the first there is nothing to return.
        """
        seconds = self.control.max_seconds
        if seconds is not None and time.perf_counter() - self._start >= seconds:
            self._exhausted = "max_seconds"
        return self.reason != "threshold"

    @property
    def reason(self) -> str:
        """Why the solve ends here, if it does; 'threshold' if there is no other reason."""
        if self.converged:
            return "eps"
        if self.diverged:
            return "diverged"
        if self.at_floor:
            return "floor"
        if self.stalled:
            return "stalled"
        if self.nfe + self.products >= self._max_nfe:
            return "max_nfe"
        return self._exhausted or "threshold"

    @property
    def left(self) -> int:
        """What is left of a threshold that counts evaluations and products together."""
        return int(min(self.threshold, self._max_nfe)) - self.nfe - self.products

    def affords(self, count: int) -> bool:
        """Whether the budget allows ``count`` more; if not, note it as the reason to stop."""
        if self.left < count:
            self._exhausted = "max_nfe" if self._max_nfe <= self.threshold else "threshold"
        return self.left >= count

    def evaluate(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate f at x (B, D); return (x, f(x), f(x) - x), all finite.

        A sample on which f is not finite is lost: from then on it rests at its best finite iterate
        with a residual of zero, and does not disturb the others. Between two checks it may go
        unnoticed. x is kept by reference: do not overwrite it. ``out`` takes f(x) - x.
        """
        point = self.trial(x, out, forgive=False)
        assert point is not None  # only a trial that is forgiven may fail
        return point

    def trial(
        self, x: Tensor, out: Tensor | None = None, forgive: bool = True
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As :meth:`evaluate`, but if f is not finite, lose no sample and return None."""
        x, fx, gx = self._value(self._settle(x, self.own.x), self.f, out)
        for vectors, norms in zip((gx, fx), self._slots[len(self._pending)], strict=True):
            torch.linalg.vector_norm(vectors, dim=1, out=norms)
        self._pending.append(x)
        first = self.nfe == 1 and self.control.check_every < self.threshold
        if forgive or first or len(self._pending) >= self.control.check_every:
            if not self._check(forgive, (gx, fx)):
                return None
            x, fx = self._settle(x, self.own.x), self._settle(fx, self.own.x)
        if self.lost_mask is not None:
            gx[self.lost_mask] = 0.0
        return x, fx, gx

    def _value(
        self, x: Tensor, f: Callable, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, f(x), f(x) - x), all (b, D) in the working dtype, for the b samples in x."""
        z = x if self.dtype == self.work_dtype else x.to(self.dtype)
        fz = checked_value(f, z.view(len(x), *self.shape[1:]))
        self.nfe += 1
        fx = fz.detach().reshape(x.shape)
        if fx.dtype != self.work_dtype or z is not x:
            # Half precision rounds x: the residual belongs to the rounded point that f saw.
            x, fx = z.to(self.work_dtype), fx.to(self.work_dtype)
        return x, fx, torch.sub(fx, x, out=out)

    def _check(self, forgive: bool = False, newest: tuple[Tensor, Tensor] | None = None) -> bool:
        """Judge the points evaluated since the last check; False if a trial is not finite.

        ``newest`` is g and f at the last point, to recompute norms out of range. Those of earlier
        points are only bounded from below, so that none counts as solved.
        """
        points, self._pending = self._pending, []
        # The only synchronisation with the device; (n, 2, B)
        norms = self._norms[: len(points)].cpu().numpy().astype(np.float64)
        norms = self._in_range(norms, newest)
        if not (self.abs_trace or np.isfinite(norms[0]).all()):
            check_finite(self.x0)
        return all(self._judge(x, own, forgive) for x, own in zip(points, norms, strict=True))

    def _in_range(self, norms: np.ndarray, newest: tuple[Tensor, Tensor] | None) -> np.ndarray:
        """Correct norms (n, 2, B) that are out of the range of the format."""
        if self._least <= norms.min() and norms.max() <= 1 / self._least:  # usual; false for NaN
            self.wide = False
            return norms
        counts = ~self.lost & (self.own.residual != 0)
        fails = ~(np.isfinite(norms) & (norms >= self._least)) & counts
        if fails.any():
            last = norms[-1]
            norms = np.where(fails, np.maximum(norms, self._least), norms)  # NaN stays NaN
            if newest is not None:
                norms[-1] = [
                    corrected_norms(n, v, counts) for n, v in zip(last, newest, strict=True)
                ]
        self.wide = out_of_range(norms[-1, 0][counts], self._least)
        return norms

    def _judge(self, x: Tensor, norms: np.ndarray, forgive: bool) -> bool:
        """Record the norms (2, B) of g(x) and f(x); keep x if it is the best iterate so far."""
        g, f = norms
        total_g, total_f = total(g), total(f)
        if self.lost_mask is not None or not math.isfinite(total_g + total_f):
            fails = ~np.isfinite(g + f) & ~self.lost
            if forgive and fails.any():
                self._record(math.inf, math.inf)
                return False
            self.lose(fails)
            g, f = norms = np.where(self.lost, 0.0, norms)
            x = self._settle(x, self.own.x)
            if self.lost.all():
                self._record(math.inf, math.inf)
                return True
            total_g, total_f = total(g), total(f)
        self._record(total_g, relative(total_g, total_f))
        residual = g if self.stop_mode == "abs" else relative(g, f)
        if self.lost_mask is not None:
            # A lost sample keeps the residual of its best iterate.
            residual = np.where(self.lost, self.own.residual, residual)
        better, step = residual < self.own.residual, np.asarray(len(self.abs_trace) - 1)
        every = bool(better.all())
        self.own.norms = norms if every else np.where(better, norms, self.own.norms)
        self.own.step = np.where(better, step, self.own.step)
        if every or (better | self.lost).all():  # usual: keep a reference, no copy
            self.own.x, self.own.residual = x, residual
        elif better.any():
            self.own.x = torch.where(mask_of(better, x), x, self.own.x)
            self.own.residual = np.where(better, residual, self.own.residual)
        newest = self.abs_trace[-1], self.rel_trace[-1]
        current = self._of_mode(newest)
        if current < self._of_mode(self.best.total):
            self.best = Best(x, residual, norms, step, newest)
        self.converged |= current < self.eps or current == 0.0
        self.at_floor |= self.rel_trace[-1] < self.control.floor
        self._samples.diverged(g, f)  # for ``far``
        if not forgive:
            found = self._divergence.diverged(np.array([total_g]), np.array([total_f]))
            self.diverged |= bool(found[0])
        return True

    def lose(self, fails: np.ndarray) -> None:
        """From now on the samples ``fails`` (B,) rest at their best iterate."""
        if fails.any():
            self.lost = self.lost | fails
            self.lost_mask = to_device(self.lost, self.device)
            self.diverged |= bool(self.lost.all())

    def stall(self, samples: np.ndarray) -> None:
        """Note samples (B,) that the method cannot improve; if all, the solve ends."""
        self.stalled |= bool(samples.all())

    @property
    def resting(self) -> np.ndarray:
        """Samples (B,) that take no further part."""
        return self.lost

    def _settle(self, x: Tensor, rest: Tensor) -> Tensor:
        """Replace the lost samples of x by ``rest`` (with where: NaN times zero is NaN)."""
        return x if self.lost_mask is None else torch.where(self.lost_mask[:, None], rest, x)

    def _record(self, absolute: float, relative: float) -> None:
        self.abs_trace.append(absolute)
        self.rel_trace.append(relative)

    def result(self) -> dict:
        """The dict that the solver returns (see :mod:`lib.solvers`)."""
        if self._pending:
            self._check()
        gave_up = (self.diverged or bool(self._divergence.far[0])) and not self.converged
        sample_nfe = np.full(len(self.x0), self.nfe)
        own = self.control.best == "sample"
        return self._solution(self._own_best() if own else self.best, sample_nfe, gave_up)

    def _own_best(self) -> Best:
        """The samples' own best iterates, with the residual over the whole batch."""
        return replace(self.own, total=totals(self.own.norms))

    def _of_mode(self, total: tuple[float, float]) -> float:
        absolute, ratio = total
        return absolute if self.stop_mode == "abs" else ratio

    def _solution(self, best: Best, sample_nfe: np.ndarray, gave_up: bool) -> dict:
        per_sample = {
            "converged": (best.residual < self.eps) | (best.residual == 0),
            "residual": best.residual,
            "finite": ~self.lost,
            "sample_nfe": sample_nfe,
        }
        return {
            # Copy if borrowed: the best iterate may be x0 itself, or a value that f returned.
            "result": best.x.to(self.dtype, copy=self._borrowed).view(self.shape),
            "lowest": self._of_mode(best.total),
            "abs_lowest": best.total[0],
            "rel_lowest": best.total[1],
            "nstep": int(best.step.max()),
            "prot_break": gave_up,
            "abs_trace": self.abs_trace,
            "rel_trace": self.rel_trace,
            "nfe": self.nfe,
            "products": self.products,
            "reason": self.reason,
            "all_finite": not self.lost.any(),
            "norms": best.norms,
            **{k: to_device(v, self.device) for k, v in per_sample.items()},
            "eps": self.eps,
            "threshold": self.threshold,
            "stop_mode": self.stop_mode,
        }


def solver_method(method: Callable[..., dict]) -> Callable[..., dict]:
    """Decorator of a method: no autograd, and reduced precision inside f only.

    Half precision and TF32 are too coarse for inner products and combinations of states.
    """

    @outside_of_compiler
    @functools.wraps(method)
    @torch.no_grad()
    def solve(f: Callable, x0: Tensor, *args, **options) -> dict:
        refuse_transforms()
        check_state(f, x0)
        kind = x0.device.type
        with full_products() as callers:
            if callers is not None:
                f = transformed(f, functools.partial(in_context, callers))
            if not torch.is_autocast_enabled(kind):
                return method(f, x0, *args, **options)
            f = transformed(f, functools.partial(in_context, same_autocast(x0.device)))
            with torch.autocast(kind, enabled=False):
                return method(f, x0, *args, **options)

    return solve


def out_of_range(residual: np.ndarray, least: float) -> bool:
    """Whether inner products of residuals with these norms may leave the range of the format."""
    return bool(((residual < least) & (residual > 0) | (residual > 1 / least)).any())


class Divergence:
    """Finds which of n samples diverge: from several steps, never from a single one.

    A residual is far out if it is a million times the first residual. Both stop modes measure the
    absolute residual: the relative residual of z -> 3 z stays at 2/3 forever. After a warm start
    the first residual may be rounding error, whose growth means nothing: it counts as at least
    sqrt(eps) ||f||. A Newton or quasi-Newton step may lead far out once and come back. A diverging
    iteration keeps rising: far out, it reaches five new highs without coming back in between.

    Args:
        count: n; 1 for the batch as a whole.
        eps: rounding error of the format.
    """

    def __init__(self, count: int, eps: float):
        self._eps = eps
        self._limit: np.ndarray | None = None  # far out above this, (n,)
        self.far = np.zeros(count, dtype=bool)  # whether the newest residual is; kept in place
        self._highest = np.zeros(count)
        self._highs = np.zeros(count, dtype=np.int64)  # new highs since the residual was last near
        self._rose = False  # whether any sample has such highs

    def diverged(self, g: np.ndarray, f: np.ndarray, rows: np.ndarray | slice = slice(None)):
        """Which of the samples ``rows`` have diverged, from the norms of g and f at a new point.

        The first call sets the limits, for all samples. Norms that are not finite say nothing.
        """
        if self._limit is None:
            self._limit = FAR * np.maximum(g, math.sqrt(self._eps) * f)
        far = self.far[rows] = g > self._limit[rows]
        if not (self._rose or far.any()):  # usual: nothing is far out
            return far
        higher = far & (g > self._highest[rows])
        self._highest[rows] = np.where(higher, g, self._highest[rows])
        self._highs[rows] = np.where(far, self._highs[rows] + higher, 0)
        self._rose = bool(self._highs.any())
        return self._highs[rows] >= HIGHS
