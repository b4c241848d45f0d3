"""Iterations whose own steps are differentiated: unrolled, or reversed.

They replace the forward solver. A trace entry is the residual at the point where f was evaluated:
the last one belongs to the point before the last step, not to the result.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lib.errors import InputError, check, check_count, is_number
from lib.gradients.adjoint import warn
from lib.solvers.arguments import check_damping, check_state, checked_value
from lib.solvers.maps import Map
from lib.solvers.norms import TINY, relative, to_device
from lib.solvers.precision import same_autocast
from lib.solvers.transforms import tangent_of

# On the way back the rounding error of the pair may grow to this fraction of one in the format of
# f. Then about one number in a million of the input of f changes.
_GROWN = 1e-6
_SPLIT = 2.0**27 + 1  # splits a float64 into two halves of 26 bits (Dekker)

Pair = tuple[Tensor, Tensor]


class Iteration:
    """Base class of the iterations whose own steps are differentiated."""

    def refuse(self, f_solver) -> None:
        """Accept any forward solver: it is not used."""

    def refuse_threshold(self, evaluations: int, name: str = "f_thres", more: int = 0) -> None:
        """Raise an InputError about ``name`` if so many evaluations cannot be differentiated."""

    def run(
        self, f: Map, z0: Tensor, evaluations: int, indexing: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor], dict]:
        """Iterate from z0 (B, ...) with so many ``evaluations`` of f.

        Returns:
            The last state; the states after the numbers of evaluations in ``indexing``, by number;
            a dict like a solver's.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Unroll(Iteration):
    """z <- z + t (f(z) - z), ``f_thres`` times, differentiated by plain autograd.

    Each step keeps its evaluation of f in memory.

    Args:
        damping: t, in (0, 1].
        checkpointing: keep only the state of each step, and evaluate f again in backward.
    """

    damping: float = 1.0
    checkpointing: bool = False

    def __post_init__(self):
        check_damping(self.damping)
        flag = self.checkpointing
        check(isinstance(flag, bool), "checkpointing", flag, "True or False")

    def run(
        self, f: Map, z0: Tensor, evaluations: int, indexing: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor], dict]:
        check_state(f, z0)
        check_count("threshold", evaluations)
        value = partial(checked_value, f)
        z, states, steps = z0, {}, []
        for i in range(1, evaluations + 1):
            if self.checkpointing and torch.is_grad_enabled():
                fz = checkpoint(value, z, use_reentrant=False, preserve_rng_state=False)
            else:
                fz = value(z)
            steps.append(_norms(z, fz))
            z = fz if self.damping == 1 else torch.lerp(z, fz, self.damping)
            if i in indexing:
                states[i] = z
        return z, states, _solution(z, steps)


@dataclass(frozen=True)
class Reversible(Iteration):
    """A coupled iteration that backward undoes, step by step (McCallum et al. 2025).

        y+ = (1 - b) y + b f(z),   z+ = (1 - b) z + b f(y+),   y_0 = z_0

    The iteration converges to y = z = f(z). A step can be solved for (y, z), so backward needs only
    the last pair, and the gradient is that of the iteration as it was run. A step makes two of the
    ``f_thres`` evaluations of f; backward makes as many, each with one vector-Jacobian product.

    Undoing n steps amplifies rounding errors by (1 - b)^-n, and by more if the errors reach f. So y
    and z are each a float64 plus an error term in the format of f (at least float32). For a bounded
    n, the inputs of f on the way back are then equal bit for bit. Backward checks that it recovers
    the start.

    Args:
        damping: b, in (0, 1).
    """

    damping: float = 0.75

    def __post_init__(self):
        good = is_number(self.damping) and 0 < self.damping < 1
        check(good, "damping", self.damping, "between 0 and 1: a full step cannot be undone")

    def refuse_threshold(self, evaluations: int, name: str = "f_thres", more: int = 0) -> None:
        # The pair is more precise than the format of f by the digits of float64.
        allowed = math.log(_GROWN / torch.finfo(torch.float64).eps)
        shrinks = -math.log1p(-self.damping)
        if (evaluations + more) // 2 * shrinks > allowed:
            most = 2 * int(allowed / shrinks) + 1 - more
            raise InputError(
                f"{name} is {evaluations}, but with a damping of {self.damping} rounding is too "
                f"much for backward to undo that: lower {name} to {most}, or the damping"
            )

    def run(
        self, f: Map, z0: Tensor, evaluations: int, indexing: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor], dict]:
        """As :meth:`Iteration.run`; ``evaluations`` is rounded down to an even number, at least 2.

        Raises:
            InputError: backward cannot undo so many steps, or forward mode is active.
        """
        check_state(f, z0)
        check_count("threshold", evaluations)
        self.refuse_threshold(evaluations)
        n = max(evaluations // 2, 1)
        history = _History(f, z0, self.damping)
        start = z0.double(), torch.zeros_like(z0, dtype=history.rest)
        pair, states, steps = [start, start], {}, []  # y, z
        for i in range(1, 2 * n + 1):
            at, moved = _roles(i)
            point = pair[at][0].to(z0.dtype)
            fz = history.evaluate(i, point)
            if tangent_of(fz) is not None:
                raise InputError(
                    "grad reversible has no forward mode: take grad ift, jfb or phantom, or "
                    "reverse mode (backward)"
                )
            steps.append(_norms(point, fz))
            pair[moved] = _Damped.apply(*pair[moved], fz, self.damping)
            if i in indexing:
                states[i] = pair[moved][0].to(z0.dtype)
        history.close(pair)
        z = pair[1][0].to(z0.dtype)
        return z, states, _solution(z, steps)


class _Damped(torch.autograd.Function):
    """(1 - b) x + b f for x = high + rest. Saves no tensor for backward."""

    @staticmethod
    def forward(ctx, high: Tensor, rest: Tensor, fz: Tensor, b: float) -> tuple[Tensor, Tensor]:
        ctx.b, ctx.dtype = b, fz.dtype
        high, more = combine((high, rest.double()), fz.double(), b)
        more = more.to(rest.dtype)
        ctx.mark_non_differentiable(more)
        return high, more

    @staticmethod
    def backward(ctx, grad: Tensor, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return (1 - ctx.b) * grad, None, (ctx.b * grad).to(ctx.dtype), None


def _roles(i: int) -> tuple[int, int]:
    """For evaluation i: which of (y, z) is the input of f, and which is updated."""
    return (1, 0) if i % 2 else (0, 1)


class _History:
    """What a reversible iteration keeps for backward: the last pair, and the way back from it.

    Forward only counts the tensors that autograd would save within f. Backward asks for them, the
    last evaluation first. At the first request f is evaluated again at the recovered point: this
    gives the tensors, and the value that takes the pair one evaluation back.
    """

    def __init__(self, f: Map, z0: Tensor, damping: float):
        self._f, self._dtype, self._damping = f, z0.dtype, damping
        self.rest = torch.promote_types(z0.dtype, torch.float32)  # dtype of the error terms
        self._start = z0.detach().clone()
        self._autocast = same_autocast(z0.device)
        self._evaluations: dict[int, dict] = {}  # by number, from 1
        self._end: list[Pair] = []
        self._pair: list[Pair] = []  # after evaluation number _at
        self._at, self._open, self._values = 0, None, []

    def evaluate(self, i: int, point: Tensor) -> Tensor:
        own = self._evaluations[i] = {"saved": 0, "trained": point.requires_grad}

        def count(t: Tensor) -> tuple[int, int]:
            own["saved"] += 1
            return i, own["saved"] - 1

        with saved_tensors_hooks(count, self._saved):
            return checked_value(self._f, point)

    def close(self, pair: list[Pair]) -> None:
        self._end = [(high.detach(), rest) for high, rest in pair]
        self._rewind()

    def _rewind(self) -> None:
        self._pair, self._at, self._open = list(self._end), len(self._evaluations), None

    def _saved(self, place: tuple[int, int]) -> Tensor:
        i, number = place
        if not self._end:
            raise RuntimeError(
                "f differentiates itself, which a reversible iteration cannot repeat: take grad "
                "ift, phantom or unroll"
            )
        if i > self._at and i != self._open:  # a second backward over a retained graph
            self._rewind()
        while self._open != i:
            self._step_back()
        return self._values[number]

    def _step_back(self) -> None:
        i, self._open, self._values = self._at, None, []
        at, moved = _roles(i)
        point = self._pair[at][0].to(self._dtype, copy=True)
        point.requires_grad_(self._evaluations[i]["trained"])
        values = []
        with (
            torch.enable_grad(),
            self._autocast(),
            saved_tensors_hooks(lambda t: values.append(t.detach()), _never),
        ):
            fz = self._f(point)
        if len(values) != self._evaluations[i]["saved"]:
            raise RuntimeError(
                f"f saved {len(values)} tensors for backward where it had saved "
                f"{self._evaluations[i]['saved']} before: for a reversible gradient it must do the "
                "same at every call (if it fills a cache in the first one, call it once before)"
            )
        high, rest = self._pair[moved]
        old = take_apart((high, rest.double()), fz.detach().double(), self._damping)
        self._pair[moved] = old[0], old[1].to(rest.dtype)
        self._at, self._open, self._values = i - 1, i, values
        if self._at == 0:
            self._check_start()

    def _check_start(self) -> None:
        size = max(high.norm().item() for high, _ in self._end)
        lost = max((high - self._start).norm().item() for high, _ in self._pair) / (size + TINY)
        if not lost <= torch.finfo(self._dtype).eps:
            warn(
                f"going back, the reversible iteration misses its start by {lost:.1e} of the "
                "state's norm, so what its first steps add to the gradient is wrong: f must give "
                "the same at every call; else lower f_thres or the damping"
            )


def _never(value):
    raise RuntimeError("this graph has no backward of its own")


@torch.no_grad()
def _norms(z: Tensor, fz: Tensor) -> Tensor:
    """||fz - z|| and ||fz|| of each sample, (2, B)."""
    z, fz = (v.flatten(1).to(torch.promote_types(fz.dtype, torch.float32)) for v in (z, fz))
    return torch.stack([torch.linalg.vector_norm(v, dim=1) for v in (fz - z, fz)])


def _solution(z: Tensor, steps: list[Tensor]) -> dict:
    """A dict like a solver's, of the result z and the norms of all steps."""
    norms = torch.stack(steps).double().cpu().numpy()  # (n, 2, B)
    absolute, value = np.linalg.norm(norms, axis=2).T
    ratio, residual = relative(absolute, value), relative(*norms[-1])
    finite = np.asarray(np.isfinite(norms).all((0, 1)))
    per_sample = {
        "residual": residual,
        "converged": residual == 0,
        "finite": finite,
        "sample_nfe": np.full(len(finite), len(norms)),
    }
    return {
        "result": z.detach(),
        "lowest": float(ratio[-1]),
        "abs_lowest": float(absolute[-1]),
        "rel_lowest": float(ratio[-1]),
        "nstep": len(norms) - 1,
        "prot_break": not np.isfinite(ratio[-1]),
        "abs_trace": absolute.tolist(),
        "rel_trace": ratio.tolist(),
        "nfe": len(norms),
        "products": 0,
        "reason": "threshold",
        "all_finite": bool(finite.all()),
        "norms": norms[-1],
        "eps": 0.0,  # no tolerance
        **{k: to_device(v, z.device) for k, v in per_sample.items()},
        "threshold": len(norms),
        "stop_mode": "rel",
    }


# Elementwise arithmetic on unevaluated sums hi + lo, with twice the digits of float64: hi is the
# sum rounded. Dekker 1971; Knuth, The Art of Computer Programming, volume 2, section 4.2.2.


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """a + b exactly, as the rounded sum and its rounding error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Tensor, factor: float) -> Pair:
    """a * factor exactly, as the rounded product and its rounding error."""
    product = a * factor
    scaled = a * _SPLIT
    a_high = scaled - (scaled - a)
    a_low = a - a_high
    high = factor * _SPLIT - (factor * _SPLIT - factor)
    low = factor - high
    return product, ((a_high * high - product) + a_high * low + a_low * high) + a_low * low


def combine(old: Pair, new: Tensor, b: float) -> Pair:
    """(1 - b) * old + b * new."""
    keep = 1 - b
    product, error = two_product(old[0], keep)
    more, its_error = two_product(new, b)
    total, rest = two_sum(product, more)
    return two_sum(total, rest + (error + its_error + keep * old[1]))


def take_apart(mixed: Pair, new: Tensor, b: float) -> Pair:
    """Inverse of :func:`combine`: the ``old`` of ``mixed``."""
    keep = 1 - b
    more, its_error = two_product(new, b)
    total, rest = two_sum(mixed[0], -more)
    rest = rest + (mixed[1] - its_error)
    quotient = total / keep
    product, error = two_product(quotient, keep)
    return two_sum(quotient, ((total - product) - error + rest) / keep)
