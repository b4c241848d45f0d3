"""What a forward solve that ends earlier or later changes: the loss and gradient of training.

For each threshold n of the forward solver and each batch i, g_i(n) is the gradient that training
would take. g_i is the exact gradient (fixed point and adjoint solved to ``EXACT``), mean its mean
over the batches. With ||.||^2 averaged over the N batches:

    error           ||g_i(n) - g_i|| / ||g_i||
    noise           sqrt(N / (N - 1)) ||g_i - mean|| / ||g_i||
    error of mean   || mean of g_i(n) - g_i || / || mean ||

All solves of a batch have the same dropout masks and the same start. All arithmetic is float64. The
Jacobian loss and that of a learned start are left out.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from textwrap import fill

import numpy as np
import torch
from torch import Tensor

from lib.deq import DEQ
from lib.errors import DEQWarning, InputError
from lib.gradients import GRADIENTS, Phantom, Shine
from lib.gradients.iterations import Iteration, Reversible
from lib.runs.task import Choices
from lib.runs.trainer import Trainer
from lib.solvers import anderson, newton_krylov
from lib.solvers.arguments import unwrapped
from lib.solvers.krylov import gmres
from lib.solvers.stats import solve_figures

EXACT = 1e-6  # relative residual of the exact solves
LONGEST = 300  # evaluations, or products, of each of them
SMALL = 0.5  # an error below this part of the noise is called small
THRESHOLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_SAME = 0.9  # part of an error; one above it is about the same
_SETTLED = 0.01  # relative residual of a solve that has ended near the fixed point
_ABOVE = 2  # thresholds above the run's own
_WIDTH = 98  # of a printed sentence


@dataclass(frozen=True)
class Row:
    """Means over the batches at one threshold; ``residual`` is relative."""

    threshold: int
    evaluations: float
    residual: float
    loss: float
    difference: float  # of the loss from that at the fixed point
    error: float
    cosine: float
    mean_error: float


@dataclass(frozen=True)
class Report:
    """The rows, and what they are compared with; ``print`` it for a table.

    Attributes:
        solver, gradient: the run's own, by name; a gradient with its own iteration has no solver.
        own: its own threshold.
        batches: their number.
        graphs: evaluations of f with a graph, beside those of the solve; None: the backward pass
            repeats those of the solve.
        products: mean products with the Jacobian of f in a backward pass, at its own threshold.
        loss: that at the fixed point.
        residual, adjoint_residual: what the exact solves left, relative: the largest of a batch's
            means over its parts.
        noise: see above.
        enough: from this threshold on, the error is below ``SMALL`` times the noise; None: nowhere.
    """

    solver: str
    gradient: str
    own: int
    batches: int
    graphs: int | None
    products: float
    loss: float
    residual: float
    adjoint_residual: float
    noise: float
    enough: int | None
    rows: list[Row]

    def as_dict(self) -> dict:
        """All figures, for JSON; one that is not finite is None."""
        found = asdict(self) | {"small": SMALL, "exact": EXACT}
        rows = [_finite(row) for row in found.pop("rows")]
        return _finite(found) | {"rows": rows, "said": self.said()}

    def again(self, row: Row) -> float:
        """Evaluations of f in a step beside those of the solve."""
        return row.evaluations if self.graphs is None else self.graphs

    @property
    def reached(self) -> bool:
        """Whether the exact solves are exact."""
        return all(r <= EXACT for r in (self.residual, self.adjoint_residual))

    def said(self) -> list[str]:
        """What the figures mean, in sentences."""
        own = next(row for row in self.rows if row.threshold == self.own)
        products = f" with {self.products:.1f} products with the Jacobian" * (self.products > 0)
        return [
            f"A training step makes {own.evaluations:.1f} evaluations of f in its solve, and "
            f"{self.again(own):g} for its gradient{products}.",
            self._hint(own) if self.reached else self._none_found(),
        ]

    def _part(self, row: Row) -> float:
        return row.error / self.noise if self.noise else math.inf

    def _none_found(self) -> str:
        return (
            f"No hint: the exact solves ended at residuals of {self.residual:.1e} (fixed point) "
            f"and {self.adjoint_residual:.1e} (adjoint), above {EXACT:g}, so they are not exact."
        )

    def _hint(self, own: Row) -> str:
        def part(row: Row) -> str:
            return f"{_short(self._part(row))} of the noise"

        small = f"{SMALL:g} of the noise of a batch"
        at_own = f"at its own threshold {self.own} it is {part(own)}"
        if self.enough is None:
            last = self.rows[-1]
            text = (
                f"No threshold of the table brings the error of the gradient below {small}: "
                f"{at_own}, at {last.threshold} {part(last)}."
            )
            if last.threshold == own.threshold or last.error <= _SAME * own.error:
                return text
            if last.residual > _SETTLED:
                return f"{text} There the solves still end at a residual of {last.residual:.1e}."
            return f"{text} More evaluations hardly change it: it is one of the backward pass."
        first = next(row for row in self.rows if row.threshold == self.enough)
        begin = (
            f"From threshold {self.enough} on, the error of the gradient is below {small}; at "
            f"{self.enough} it is {part(first)}"
        )
        if self.enough == self.own:
            return f"{begin}. That is the run's own threshold."
        if self.enough > self.own:
            return f"{begin}, {at_own}."
        few, all_of_them = (row.evaluations + self.again(row) for row in (first, own))
        return (
            f"{begin}, {at_own}. A hint, no promise: {self.enough} may do, with "
            f"{few / all_of_them:.0%} of the evaluations."
        )

    def __str__(self) -> str:
        head = (
            "f_thres", "evaluations", "residual", "loss", "difference", "error", "cosine",
            "error/noise", "error of mean",
        )  # fmt: skip
        rows = [
            (
                f"{row.threshold}{'*' * (row.threshold == self.own)}",
                f"{row.evaluations:.1f}",
                f"{row.residual:.1e}",
                f"{row.loss:.4f}",
                f"{row.difference:+.1e}",
                _short(row.error),
                f"{row.cosine:.4f}",
                _short(self._part(row)),
                _short(row.mean_error),
            )
            for row in self.rows
        ]
        exact = ("exact", "", f"{self.residual:.1e}", f"{self.loss:.4f}")
        noise = ("noise", "", "", "", "", f"{self.noise:.3f}")
        solver = f"solver {self.solver}, " * bool(self.solver)
        return "\n".join(
            [
                f"{solver}gradient {self.gradient}, {self.batches} batches of the training data "
                "(*: the run's own f_thres)",
                *_columns([head, *rows, exact, noise]),
                *(fill(line, _WIDTH) for line in self.said()),
            ]
        )


def measure(trainer: Trainer, own: int, batches: Iterator) -> Report:
    """Solve each batch exactly, and with each threshold around the run's ``own``.

    ``trainer`` is at equilibrium. While a batch is the current one of ``batches``, ``part`` of the
    trainer gives the losses of its parts. The trainer's model becomes float64.
    """
    torch.manual_seed(0)
    model, deq = trainer.model.double().train(), trainer.model.deq
    grad, solver = deq.grad, deq.f_solver
    exact, rows = _Sums(), {n: _Sums() for n in _thresholds(own, grad)}
    left: dict[str, list[float]] = {"forward": [], "backward": []}  # residuals
    products, parameters = 0.0, _learned(model)
    for number, batch in enumerate(batches):
        batch = [t.double() if t.is_floating_point() else t for t in batch]
        step = partial(_step, trainer, parameters, batch, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DEQWarning)  # the table has the residuals
            with _exactly(deq):
                loss, g = step(own)
            for which in left:
                left[which].append(getattr(deq.stats, which).means()["rel_residual"])
            exact.add(deq, loss, g)
            for n, sums in rows.items():
                sums.add(deq, *step(n), exact=g)
                if n == own:
                    products += _products(grad, deq)
    n = exact.count
    squares, mean = exact.squares / n, exact.vector / n
    noise = math.sqrt(max(squares - _dot(mean, mean), 0.0) * n / (n - 1) / squares)
    table = [sums.row(threshold, exact) for threshold, sums in rows.items()]
    return Report(
        solver="" if isinstance(grad, Iteration) else unwrapped(solver)[0].__name__,
        gradient=next(name for name, kind in GRADIENTS.items() if kind is type(grad)),
        own=own,
        batches=n,
        graphs=_graphs(grad),
        products=products / n,
        loss=exact.loss / n,
        residual=float(np.max(left["forward"])),  # of numbers with NaN it is NaN
        adjoint_residual=float(np.max(left["backward"])),
        noise=noise,
        enough=_enough(table, SMALL * noise),
        rows=table,
    )


class _Sums:
    """Sums over batches at one threshold."""

    def __init__(self):
        self.count, self.squares, self.vector = 0, 0.0, torch.zeros(())
        self.loss = self.evaluations = self.residual = self.cosine = 0.0

    def add(self, deq: DEQ, loss: float, g: Tensor, *, exact: Tensor | None = None) -> None:
        figures = deq.stats.forward.means()
        self.evaluations += figures["nfe"]
        self.residual += figures["rel_residual"]
        self.loss += loss
        self.count += 1
        if exact is not None:
            norms = math.sqrt(_dot(g, g) * _dot(exact, exact))
            self.cosine += _dot(g, exact) / norms if norms else math.nan
            g = g - exact
        self.squares += _dot(g, g)
        self.vector = self.vector + g

    def row(self, threshold: int, exact: "_Sums") -> Row:
        n = self.count
        return Row(
            threshold,
            evaluations=self.evaluations / n,
            residual=self.residual / n,
            loss=self.loss / n,
            difference=(self.loss - exact.loss) / n,
            error=math.sqrt(self.squares / exact.squares),
            cosine=self.cosine / n,
            mean_error=(self.vector.norm() / exact.vector.norm()).item(),
        )


def _step(
    trainer: Trainer, parameters: list[Tensor], batch: Sequence[Tensor], seed: int, f_thres: int
) -> tuple[float, Tensor]:
    """Loss and gradient of a batch, with the dropout masks of ``seed``."""
    torch.manual_seed(seed)
    trainer.model.deq.stats.reset()
    loss, total = 0.0, torch.zeros(())
    for index, part in enumerate(trainer.split(batch)):
        summand = trainer.part(index, part, Choices(f_thres)).loss
        loss += summand.item()
        grads = torch.autograd.grad(summand, parameters, materialize_grads=True)
        total = total + torch.cat([g.flatten() for g in grads]).cpu()
    return loss, total


def _learned(model: torch.nn.Module) -> list[Tensor]:
    """The parameters that the loss trains: those of a learned start have a loss of their own."""
    start = getattr(model, "start", None)
    own = set() if start is None else set(start.parameters())
    return [p for p in model.parameters() if p not in own]


@contextmanager
def _exactly(deq: DEQ) -> Iterator[None]:
    """Solve to ``EXACT`` within a ``with`` block, in both passes."""
    grad, f_solver, b_solver = deq.grad, deq.f_solver, deq.b_solver
    deq.grad = "ift"
    deq.f_solver, deq.b_solver = _fixed_point, _adjoint
    try:
        yield
    finally:
        deq.f_solver, deq.b_solver = f_solver, b_solver
        deq.grad = grad


def _fixed_point(f: Callable, x0: Tensor, threshold: int = 0, stop_mode: str = "rel") -> dict:
    """By Anderson's method, and if that ends too early, by Newton's from there."""
    found = anderson(f, x0, m=30, threshold=LONGEST, eps=EXACT)
    if solve_figures(found)["rel_residual"] <= EXACT:
        return found
    more = newton_krylov(f, found["result"], threshold=LONGEST, eps=EXACT)
    return min(found, more, key=lambda solution: solve_figures(solution)["rel_residual"])


def _adjoint(f: Callable, x0: Tensor, threshold: int = 0, stop_mode: str = "rel") -> dict:
    return gmres(f, x0, threshold=LONGEST, eps=EXACT)


def _thresholds(own: int, grad) -> list[int]:
    """Those below the run's own, its own, and a few above, as far as the gradient allows."""
    above = [n for n in THRESHOLDS if n > own][:_ABOVE]
    wanted = sorted({own, *(n for n in THRESHOLDS if n < own), *above})
    allowed = []
    for n in wanted:
        try:
            grad.refuse_threshold(n)
        except InputError:
            break
        allowed.append(n)
    return allowed


def _graphs(grad) -> int | None:
    """Evaluations of f with a graph, beside those of the solve; None: backward repeats these."""
    if isinstance(grad, Iteration):
        return None if isinstance(grad, Reversible) or grad.checkpointing else 0
    return grad.steps if isinstance(grad, Phantom) and grad.form == "unrolled" else 1


def _products(grad, deq: DEQ) -> float:
    """Products with the Jacobian in the last backward pass."""
    if isinstance(grad, Phantom) and grad.form == "neumann":
        return grad.steps - 1
    backward = deq.stats.backward
    if not backward.solves:
        return 0.0
    # A solve begins with the product with 0, which is known; that of SHINE begins elsewhere.
    return backward.means()["nfe"] - (not isinstance(grad, Shine))


def _enough(rows: list[Row], limit: float) -> int | None:
    """The threshold from which on all errors are below a limit."""
    found = None
    for row in reversed(rows):
        if not row.error < limit:
            break
        found = row.threshold
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a, b).item()


def _short(value: float) -> str:
    return f"{value:.1e}" if abs(value) >= 100 else f"{value:.3f}"


def _finite(values: dict) -> dict:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
