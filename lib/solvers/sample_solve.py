"""A solve that stops per sample: a finished sample leaves the solve and costs nothing more.

A sample is finished once its own residual is below ``eps`` (or the floor), it diverges, f is not
finite for it, or a Krylov method cannot lower its residual. Its result is its own best iterate, and
so does not depend on the other samples of the batch.

A method goes on with the rows of the unfinished samples: ``solve.kept`` holds their indices among
the rows so far (None: all of them). If f can be restricted to samples (``f.select``, see
:mod:`lib.solvers.maps`), it sees these alone, otherwise the whole batch, with the finished samples
at rest. Methods that multiply with the Jacobian of the whole batch keep all rows
(``needs_all``): finished samples stay at their best iterate, with a residual of zero.

The result differs from that of a solve that stops by the batch:

- ``sample_nfe`` is the number of evaluations until the sample was finished.
- In the traces, norms over the whole batch, a finished sample counts with the residual of its
  result. ``lowest`` and ``nstep`` are as with best='sample'.
- ``reason``, once all samples are finished, is the worst among them: 'diverged' if any diverged or
  all are lost (see ``finite``), else 'stalled', else 'floor', else 'eps'.
- ``prot_break`` is True if a sample diverged or was far out at the end, or if all are lost.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lib.solvers.arguments import Control, check_finite
from lib.solvers.maps import Map
from lib.solvers.norms import corrected_norms, mask_of, relative, to_device, totals
from lib.solvers.solve import Solve, out_of_range


class SampleSolve(Solve):
    """A :class:`~lib.solvers.solve.Solve` that judges and stops each sample by itself."""

    def __init__(self, *arguments, needs_all: bool):
        super().__init__(*arguments)
        batch = len(self.x0)
        self.needs_all = needs_all
        self.rows = np.arange(batch)  # the samples that the method holds
        self.done = np.zeros(batch, dtype=bool)
        self.own.residual, self.own.norms = self.own.residual.copy(), self.own.norms.copy()
        self._norms_now = self.own.norms.copy()  # of g and f at the newest point
        self._sample_nfe = np.zeros(batch, dtype=np.int64)
        self._diverged, self._stalled = np.zeros((2, batch), dtype=bool)
        self._f_rows = self.f

    def evaluate(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As in a Solve, of the b rows kept so far; returns the rows that the method goes on with.

        ``out`` keeps all b rows.
        """
        if self.needs_all:
            x = self._at_rest(x)
        x, fx, gx = self._value(x, self._f_rows, out)
        norms = torch.stack([torch.linalg.vector_norm(v, dim=1) for v in (gx, fx)])
        norms, counts = norms.cpu().numpy().astype(np.float64), ~self.done[self.rows]
        norms = np.stack(
            [corrected_norms(n, v, counts) for n, v in zip(norms, (gx, fx), strict=True)]
        )
        if self.nfe == 1 and not np.isfinite(norms).all():
            check_finite(self.x0)
        self.wide = out_of_range(norms[0][counts], self._least)
        self._judge_rows(x, norms)
        done, self.kept = self.done[self.rows], None
        self.far = self._samples.far[self.rows] & ~done
        if not done.any():
            return x, fx, gx
        if self.needs_all:
            gx.masked_fill_(mask_of(done, gx), 0.0)
            return self._at_rest(x), self._at_rest(fx), gx
        self.kept = to_device(np.flatnonzero(~done), self.device)
        self.rows, self.far = self.rows[~done], self.far[~done]
        if len(self.rows):
            self._f_rows = self._restricted()
        return x[self.kept], fx[self.kept], gx[self.kept]

    def _at_rest(self, x: Tensor) -> Tensor:
        """x (B, D) with the finished samples at their best iterate."""
        if not self.done.any():
            return x
        return torch.where(mask_of(self.done, x), self.own.x, x)

    def _restricted(self) -> Map:
        rows = to_device(self.rows, self.device)
        select = getattr(self.f, "select", None)
        if select is not None:
            return select(rows)
        rest = self.own.x.to(self.dtype).view(self.shape)

        def f(z: Tensor) -> Tensor:
            return self.f(rest.index_copy(0, rows, z))[rows]

        return f

    def _judge_rows(self, x: Tensor, norms: np.ndarray) -> None:
        """Record the norms (2, b) of g and f at x (b, D); update best iterates and ``done``."""
        went_on = ~self.done[self.rows]
        rows, norms = self.rows[went_on], norms[:, went_on]
        finite = np.isfinite(norms).all(0)
        g, f = norms = np.where(finite, norms, 0.0)
        own_relative = relative(g, f)
        residual = np.where(finite, g if self.stop_mode == "abs" else own_relative, np.inf)
        self._sample_nfe[rows] += 1
        better = residual < self.own.residual[rows]
        self._keep_best(x, rows[better], np.flatnonzero(went_on)[better])
        self.own.residual[rows[better]] = residual[better]
        self.own.norms[:, rows[better]] = norms[:, better]
        self.own.step[rows[better]] = self.nfe - 1

        self.lost[rows[~finite]] = True
        reached = (residual < self.eps) | (residual == 0)
        diverged = finite & ~reached & self._samples.diverged(g, f, rows)
        self._diverged[rows[diverged]] = True
        ends = ~finite | reached | diverged | (own_relative < self.control.floor)
        self.done[rows[ends]] = True
        self._norms_now[:, rows] = norms
        self._norms_now[:, self.done] = self.own.norms[:, self.done]
        self._record(*totals(self._norms_now))

    def _keep_best(self, x: Tensor, samples: np.ndarray, places: np.ndarray) -> None:
        """Keep row ``places[i]`` of x as the best iterate so far of sample ``samples[i]``."""
        if len(samples) == len(self.x0):  # a reference, no copy
            self.own.x, self._borrowed = x, True
        elif len(samples):
            if self._borrowed:
                self.own.x, self._borrowed = self.own.x.clone(), False
            at, source = (to_device(i, self.device) for i in (samples, places))
            self.own.x.index_copy_(0, at, x[source])

    def lose(self, fails: np.ndarray) -> None:
        self.lost, self.done = self.lost | fails, self.done | fails

    def stall(self, samples: np.ndarray) -> None:
        self._stalled |= samples & ~self.done
        self.done = self.done | samples

    @property
    def resting(self) -> np.ndarray:
        return self.done

    @property
    def reason(self) -> str:
        if not self.done.all():
            return super().reason
        if self._gave_up():
            return "diverged"
        if self._stalled.any():
            return "stalled"
        own = self.own.residual[~self.lost]
        return "eps" if ((own < self.eps) | (own == 0)).all() else "floor"

    def _gave_up(self) -> bool:
        return bool(self._diverged.any() or self.lost.all())

    def result(self) -> dict:
        gave_up = self._gave_up() or bool((self._samples.far & ~self.done).any())
        return self._solution(self._own_best(), self._sample_nfe, gave_up)


def start(
    f: Callable,
    x0: Tensor,
    threshold: int,
    eps: float,
    stop_mode: str,
    control: dict,
    *,
    needs_all: bool = False,
) -> Solve:
    """The object that keeps a solve, per batch or per sample; ``control`` holds keywords.

    ``needs_all``: the method needs every residual and the rows of finished samples.
    """
    options = Control(**control)
    if needs_all:
        options = replace(options, check_every=1)
    make = partial(SampleSolve, needs_all=needs_all) if options.stop == "sample" else Solve
    return make(f, x0, threshold, eps, stop_mode, options)
