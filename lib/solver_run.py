"""One solve: evaluates f, records residuals, keeps the best point, decides when to stop.

What the methods of :mod:`lib.solvers` share.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from lib.attachment import (
    outside_of_compiler,
    refuse_batched,
    refuse_transforms,
    tangent_of,
)
from lib.divergence import Divergence, far_out
from lib.errors import InputError
from lib.host import to_device
from lib.maps import transformed
from lib.matmul_precision import full_products, within
from lib.norms import least_norm, mended, relative, total


@dataclass(frozen=True, kw_only=True)
class Control:
    """Keywords that all solvers take.

    Attributes:
        stop: 'batch' stops by norms over the whole batch, as published; 'sample' by each sample's
            own: see :mod:`lib.sample_run`.
        best: which point is returned. 'batch': that of the lowest residual over the whole batch, as
            published. 'sample': each sample's own, at no cost: where one sample wanders, its mates
            do not pay for it. Neither changes when the solve stops. None is that of ``stop``, which
            'sample' needs.
        check_every: look at the residual only every so many evaluations. Between checks a GPU
            need not wait for the host; up to ``check_every - 1`` evaluations may be done in vain,
            and as many more points are held. The point returned is the best one all the same.
            A line search and Krylov methods need every residual, and take no notice of it.
        floor: stop as well, in either mode, once ||f(z) - z|| / ||f(z)|| is below this: where
            the rounding of f itself begins, say.
        max_nfe: stop after so many evaluations and products with the Jacobian, whatever the
            threshold counts.
        max_seconds: begin no further evaluation or product after so much time, but for that at
            the point that products have led to. What is reached by then depends on the machine:
            a run is no longer repeatable.
    """

    stop: str = "batch"
    best: str | None = None
    check_every: int = 1
    floor: float = 0.0
    max_nfe: int | None = None
    max_seconds: float | None = None

    def __post_init__(self):
        check(self.stop in ("batch", "sample"), "stop", self.stop, "'batch' or 'sample'")
        best = (None, "batch", "sample")
        check(self.best in best, "best", self.best, "None, 'batch' or 'sample'")
        if self.stop == "sample" and self.best == "batch":
            raise InputError("stop='sample' returns each sample's own best point: leave best out")
        check_count("check_every", self.check_every)
        check_number("floor", self.floor)
        if self.max_nfe is not None:
            check_count("max_nfe", self.max_nfe)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, positive=True)
        if self.stop == "sample" and self.check_every > 1:
            raise InputError("stop='sample' looks at every residual: leave check_every out")


class Run:
    """One solve of z = f(z) from ``x0``; made by :func:`~lib.sample_run.start`.

    Points are (B, D) tensors in the working dtype: that of ``x0``, but float32 for half
    precision, whose inner products would not carry a solver. f sees the shape and dtype of x0.

    Norms are brought to the host every ``check_every`` evaluations, in one transfer, and judged
    there: a dozen operations on a few numbers cost more as kernels than the norms themselves.
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
        check_arguments(f, x0, threshold, eps, stop_mode)
        self.f = f
        self.shape, self.dtype, self.device = x0.shape, x0.dtype, x0.device
        self.threshold, self.eps, self.stop_mode = threshold, float(eps), stop_mode
        self.control, self.check_every = control, control.check_every
        self._start = time.perf_counter()
        self.work_dtype = torch.promote_types(x0.dtype, torch.float32)
        self.x0 = x0.detach().reshape(len(x0), -1).to(self.work_dtype)  # (B, D)
        self.nfe = 0
        self.products = 0  # with the Jacobian, by methods that take them
        self.kept: Tensor | None = None  # see SampleRun
        self.abs_trace: list[float] = []
        self.rel_trace: list[float] = []
        self.best, self.best_index, self.lowest = self.x0, 0, math.inf
        self.lowest_of = {"abs": math.inf, "rel": math.inf}
        self.best_residual = np.full(len(x0), math.inf)
        self.best_norms = np.full((2, len(x0)), math.inf)  # of g and f
        # Whether residuals are of a size whose inner products float32 does not hold.
        self.wide = False
        self._least = least_norm(self.x0)
        # Samples on which f was not finite, on the host and (once there are any) on the device.
        self.lost, self.lost_mask = np.zeros(len(x0), dtype=bool), None
        self.converged = self.diverged = self.at_floor = self.stalled = False
        self._short = ""  # of what the solve ran out: a reason
        self.far = np.zeros(len(x0), dtype=bool)  # samples whose newest point is far out
        self._divergence = Divergence(1, torch.finfo(self.work_dtype).eps)
        # The best finite iterate of each sample: what a sample falls back to once f fails on it,
        # or what it is given at the end. Norms of g and f there, and at which step it is.
        self.own_best, self.own_residual = self.x0, self.best_residual
        self._own_norms = np.full((2, len(x0)), math.inf)
        self._own_step = np.zeros(len(x0), dtype=np.int64)
        self._borrowed = True  # the best point may be somebody else's tensor, not to be written to
        self._pending: list[Tensor] = []  # points not yet judged, and their norms:
        self._norms = self.x0.new_empty(min(self.check_every, threshold + 1), 2, len(x0))
        self._slots = [norms.unbind() for norms in self._norms]

    @property
    def stopped(self) -> bool:
        """Whether the solve ends here, for another reason than the threshold.

        Asked after an evaluation: without one there is nothing to return.
        """
        seconds = self.control.max_seconds
        if seconds is not None and time.perf_counter() - self._start >= seconds:
            self._short = "max_seconds"
        return self.reason != "threshold"

    @property
    def reason(self) -> str:
        """Why the solve ends here, if it does: 'threshold' where nothing else ends it."""
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
        return self._short or "threshold"

    @property
    def left(self) -> int:
        """How many evaluations and products may follow, where the threshold counts both."""
        return min(self.threshold, self._max_nfe) - self.nfe - self.products

    @property
    def _max_nfe(self) -> float:
        return math.inf if self.control.max_nfe is None else self.control.max_nfe

    def affords(self, count: int) -> bool:
        """Whether so many may follow; where not, that is what the solve ends by."""
        if self.left < count:
            self._short = "max_nfe" if self._max_nfe <= self.threshold else "threshold"
        return self.left >= count

    def evaluate(
        self, x: Tensor, out: Tensor | None = None, forgive: bool = False
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Evaluate f at x (B, D): returns (x, f(x), f(x) - x), all finite.

        A sample on which f is not finite is lost: from then on it rests at its best finite
        iterate with a residual of zero, so that it neither moves nor disturbs its batch mates.
        With ``forgive`` (a line search's trial) None is returned instead and nothing is lost.
        Between checks a sample may be non-finite without having been found out.

        Args:
            x: the point; kept by reference, so it must not be overwritten afterwards.
            out: where f(x) - x is written; a new tensor if None.
        """
        x, fx, gx = self._value(self._settle(x, self.own_best), self.f, out)
        for vectors, norms in zip((gx, fx), self._slots[len(self._pending)], strict=True):
            torch.linalg.vector_norm(vectors, dim=1, out=norms)
        self._pending.append(x)
        if forgive or self.nfe == 1 or len(self._pending) >= self.check_every:
            if not self._check(forgive, (gx, fx)):
                return None
            if self.lost_mask is not None:
                x, fx = self._settle(x, self.own_best), self._settle(fx, self.own_best)
                gx[self.lost_mask] = 0.0
        elif self.lost_mask is not None:
            gx[self.lost_mask] = 0.0
        return x, fx, gx

    def _value(
        self, x: Tensor, f: Callable, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, f(x), f(x) - x), all (b, D) in the working dtype, for b samples of x's."""
        z = x if self.dtype == self.work_dtype else x.to(self.dtype)
        fz = checked_value(f, z.view(len(x), *self.shape[1:]))
        self.nfe += 1
        fx = fz.detach().reshape(x.shape)
        if fx.dtype != self.work_dtype or z is not x:
            # Half precision rounds: the residual belongs to the point that was used.
            x, fx = z.to(self.work_dtype), fx.to(self.work_dtype)
        return x, fx, torch.sub(fx, x, out=out)

    def _check(self, forgive: bool = False, newest: tuple[Tensor, Tensor] | None = None) -> bool:
        """Judge what was evaluated since the last check; False for a trial to be forgotten.

        ``newest``: g and f at the last point, of which norms out of range are found again. Of the
        points before they can only be bounded: from below, so that none counts as solved.
        """
        points, self._pending = self._pending, []
        # The one synchronisation with the device.
        norms = self._norms[: len(points)].cpu().numpy().astype(np.float64)  # (n, 2, B)
        norms = self._in_range(norms, newest)
        if self.nfe == 1 and not np.isfinite(norms).all():
            check_finite(self.x0)
        return all(self._judge(x, g, f, forgive) for x, (g, f) in zip(points, norms, strict=True))

    def _in_range(self, norms: np.ndarray, newest: tuple[Tensor, Tensor] | None) -> np.ndarray:
        """Norms (n, 2, B) as float64 would have them."""
        counts = ~self.lost & (self.own_residual != 0)
        fails = ~(np.isfinite(norms) & (norms >= self._least)) & counts
        if fails.any():
            last = None if newest is None else norms[-1]
            norms = np.where(fails, np.maximum(norms, self._least), norms)  # NaN stays NaN
            if last is not None:
                norms[-1] = [mended(n, v, counts) for n, v in zip(last, newest, strict=True)]
        self.wide = out_of_range(norms[-1, 0][counts], self._least)
        return norms

    def _judge(self, x: Tensor, g: np.ndarray, f: np.ndarray, forgive: bool) -> bool:
        """Record the norms (B,) of g(x) and f(x), and keep x where it is the best so far."""
        total_g, total_f = total(g), total(f)
        if self.lost_mask is not None or not math.isfinite(total_g + total_f):
            fails = ~np.isfinite(g + f) & ~self.lost
            if forgive and fails.any():
                self._record(math.inf, math.inf)
                return False
            self.lose(fails)
            g, f = np.where(self.lost, 0.0, g), np.where(self.lost, 0.0, f)
            x = self._settle(x, self.own_best)
            if self.lost.all():
                self._record(math.inf, math.inf)
                return True
            total_g, total_f = total(g), total(f)
        self._record(total_g, relative(total_g, total_f))
        residual = g if self.stop_mode == "abs" else relative(g, f)
        if self.lost_mask is not None:
            # What is lost keeps its own best iterate and that iterate's residual.
            residual = np.where(self.lost, self.own_residual, residual)
        better = residual < self.own_residual
        self._own_norms = np.where(better, [g, f], self._own_norms)
        self._own_step = np.where(better, len(self.abs_trace) - 1, self._own_step)
        if better.all() or (better | self.lost).all():  # the usual step: a reference, no copy
            self.own_best, self.own_residual = x, residual
        elif better.any():
            mask = to_device(better, self.device)
            self.own_best = torch.where(mask[:, None], x, self.own_best)
            self.own_residual = np.where(better, residual, self.own_residual)
        current = self.abs_trace[-1] if self.stop_mode == "abs" else self.rel_trace[-1]
        if current < self.lowest:
            self.best, self.best_index, self.lowest = x, len(self.abs_trace) - 1, current
            self.best_residual, self.best_norms = residual, np.stack([g, f])
            self.lowest_of = {"abs": self.abs_trace[-1], "rel": self.rel_trace[-1]}
        self.converged |= current < self.eps or current == 0.0
        self.at_floor |= self.rel_trace[-1] < self.control.floor
        if self.nfe == 1:
            self._far_out = far_out(g, f, torch.finfo(self.work_dtype).eps)
        self.far = g > self._far_out
        if not forgive:
            found = self._divergence.found(np.array([total_g]), np.array([total_f]))
            self.diverged |= bool(found[0])
        return True

    def lose(self, fails: np.ndarray) -> None:
        """Mark samples (B,) as lost: they rest at their best point from now on."""
        if fails.any():
            self.lost = self.lost | fails
            self.lost_mask = to_device(self.lost, self.device)
            self.diverged |= bool(self.lost.all())

    def stall(self, samples: np.ndarray) -> None:
        """Note samples (B,) that their method cannot bring any further; if all, it ends there."""
        self.stalled |= bool(samples.all())

    @property
    def resting(self) -> np.ndarray:
        """Samples (B,) that take no further part."""
        return self.lost

    def _settle(self, x: Tensor, rest: Tensor) -> Tensor:
        """Replace the lost samples of x by ``rest``: chosen, since NaN times zero is NaN."""
        return x if self.lost_mask is None else torch.where(self.lost_mask[:, None], rest, x)

    def _record(self, absolute: float, relative: float) -> None:
        self.abs_trace.append(absolute)
        self.rel_trace.append(relative)

    def result(self) -> dict:
        """What the solver returns (see :mod:`lib.solvers`)."""
        if self._pending:
            self._check()
        gave_up = (self.diverged or bool(self._divergence.far[0])) and not self.converged
        sample_nfe = np.full(len(self.x0), self.nfe)
        if self.control.best == "sample":
            self._take_own_best()
            return self._solution(
                self.own_best, self.own_residual, self._own_norms, sample_nfe, gave_up
            )
        return self._solution(self.best, self.best_residual, self.best_norms, sample_nfe, gave_up)

    def _take_own_best(self) -> None:
        """Of each sample's own best point: the residual over the batch, and the last step of it."""
        self.lowest_of = dict(zip(("abs", "rel"), totals(self._own_norms), strict=True))
        self.lowest, self.best_index = self.lowest_of[self.stop_mode], int(self._own_step.max())

    def _solution(
        self,
        best: Tensor,
        residual: np.ndarray,
        norms: np.ndarray,
        sample_nfe: np.ndarray,
        gave_up: bool,
    ) -> dict:
        per_sample = {
            "converged": (residual < self.eps) | (residual == 0),
            "residual": residual,
            "finite": ~self.lost,
            "sample_nfe": sample_nfe,
        }
        return {
            # A tensor of the solve's own: the best point may be x0 itself, or what f returned.
            "result": best.to(self.dtype, copy=self._borrowed).view(self.shape),
            "lowest": self.lowest,
            "abs_lowest": self.lowest_of["abs"],
            "rel_lowest": self.lowest_of["rel"],
            "nstep": self.best_index,
            "prot_break": gave_up,
            "abs_trace": self.abs_trace,
            "rel_trace": self.rel_trace,
            "nfe": self.nfe,
            "products": self.products,
            "reason": self.reason,
            "all_finite": not self.lost.any(),
            "norms": norms,
            **{k: to_device(v, self.device) for k, v in per_sample.items()},
            "eps": self.eps,
            "threshold": self.threshold,
            "stop_mode": self.stop_mode,
        }


def solver_method(method: Callable[..., dict]) -> Callable[..., dict]:
    """Decorator of a method: nothing is differentiated, and fewer digits are for f alone.

    Inner products and combinations of states in half precision, or in TF32, would not carry a
    solver: autocast and torch's precision of float32 products hold in f and in products with its
    Jacobian, and there only.
    """

    @outside_of_compiler
    @functools.wraps(method)
    @torch.no_grad()
    def solve(f: Callable, x0: Tensor, *args, **options) -> dict:
        refuse_transforms()
        kind = x0.device.type if isinstance(x0, Tensor) else "cpu"
        with full_products() as callers:
            if callers is not None and callable(f):
                f = transformed(f, lambda f: within(callers, f))
            if not (torch.is_autocast_enabled(kind) and callable(f)):
                return method(f, x0, *args, **options)
            dtype = torch.get_autocast_dtype(kind)
            f = transformed(f, lambda f: within(lambda: torch.autocast(kind, dtype), f))
            with torch.autocast(kind, enabled=False):
                return method(f, x0, *args, **options)

    return solve


def check(condition: bool, name: str, value, accepted: str) -> None:
    """Refuse an argument, in one line."""
    if not condition:
        raise InputError(f"{name} is {value!r}, but must be {accepted}")


def check_count(name: str, value, least: int = 1) -> None:
    """Refuse what is not an integer of at least so much."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    check(integer and value >= least, name, value, f"an integer of at least {least}")


def is_number(value) -> bool:
    """Whether a value is a real number; True and False are none here."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: str, value, *, positive: bool = False) -> None:
    """Refuse what is not a number of at least 0, or above it."""
    fits = is_number(value) and (value > 0 if positive else value >= 0)
    check(fits, name, value, "a number above 0" if positive else "a number of at least 0")


def check_damping(value) -> None:
    """Refuse what is not the share of a step."""
    check(is_number(value) and 0 < value <= 1, "damping", value, "in (0, 1]")


def checked_value(f: Callable, z: Tensor) -> Tensor:
    """f(z); refused where f changes the shape, or writes to a state."""
    before = _version(z)
    fz = f(z)
    if _version(z) != before:
        raise InputError(
            "f writes to a state that it was given, or gave: let it return a new tensor at "
            "every call (no operation in place on its argument, no buffer of its own)"
        )
    if not isinstance(fz, Tensor) or fz.shape != z.shape:
        found = tuple(fz.shape) if isinstance(fz, Tensor) else type(fz).__name__
        raise InputError(f"f must map {tuple(z.shape)} to the same shape, but gave {found}")
    refuse_batched(tangent_of(fz))
    return fz


def check_arguments(f, x0, threshold, eps=0.0, stop_mode="rel") -> None:
    """Refuse what no solve can begin with."""
    check(callable(f), "f", f, "a function of the state")
    check(isinstance(x0, Tensor), "x0", type(x0).__name__, "a tensor (see list2vec for lists)")
    check(x0.is_floating_point(), "dtype of x0", x0.dtype, "a floating dtype")
    check(x0.dim() >= 1 and x0.numel() > 0, "shape of x0", tuple(x0.shape), "(batch, ...)")
    check_count("threshold", threshold)
    check_number("eps", eps)
    check(stop_mode in ("abs", "rel"), "stop_mode", stop_mode, "'abs' or 'rel'")


def check_finite(x0: Tensor) -> None:
    """Refuse a start that is not finite."""
    check(bool(torch.isfinite(x0).all()), "x0", "not finite", "finite everywhere")


def out_of_range(residual: np.ndarray, least: float) -> bool:
    """Whether inner products of residuals of these norms might leave the range of the format.

    ``least`` is that of :func:`~lib.norms.least_norm`; its inverse is as far on the other side.
    """
    return bool(((residual < least) & (residual > 0) | (residual > 1 / least)).any())


def totals(norms: np.ndarray) -> tuple[float, float]:
    """The residual over the batch, 'abs' and 'rel', from norms (2, B) of g and f."""
    found = np.isfinite(norms).all(0)  # where f never was finite there is none
    if not found.any():
        return math.inf, math.inf
    g, f = (total(own) for own in norms[:, found])
    return g, relative(g, f)


def _version(z: Tensor) -> int | None:
    """How often z was written to, as far as that is counted."""
    return None if z.is_inference() else z._version
