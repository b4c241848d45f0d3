"""Iterations that are differentiated as they were run: unrolled, or reversed.

They take the place of a forward solver: :meth:`run` gives the last state, states on the way, and
a dict like a solver's. Each step's residual is that of the point f was evaluated at, so the last
entry of the traces belongs to the step that led to the result.
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

from lib.adjoint import warn
from lib.attachment import tangent_of
from lib.double_double import Pair, combine, take_apart
from lib.errors import InputError
from lib.host import to_device
from lib.maps import Map
from lib.norms import TINY
from lib.precision import same_autocast
from lib.solver_run import check, check_arguments, check_damping, checked_value, is_number

# On the way back to the start, rounding of the pair may grow to this part of a rounding error of
# f's own format: too little to change what f is given, but for one number in a million.
_GROWN = 1e-6


class Iteration:
    """Base of the iterations that are differentiated as they were run."""

    def refuse(self, f_solver) -> None:
        """Any forward solver will do: it is not used."""

    def refuse_threshold(self, evaluations: int, name: str = "f_thres", more: int = 0) -> None:
        """Raise an InputError for a threshold of that name that it cannot run to, or as many
        evaluations ``more``."""

    def run(
        self, f: Map, z0: Tensor, evaluations: int, indexing: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor], dict]:
        """The state after so many evaluations, those after ``indexing`` of them, the dict."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unroll(Iteration):
    """z <- z + t (f(z) - z), ``f_thres`` times, differentiated by plain autograd.

    Memory grows with the steps: by the evaluation of f, or by the state alone with
    ``checkpointing``, which evaluates f once more per step in backward.

    Args:
        damping: t, in (0, 1].
        checkpointing: recompute the evaluations of f.
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
        check_arguments(f, z0, evaluations)
        value = partial(checked_value, f)
        z, states, steps = z0, {}, _Steps()
        for i in range(1, evaluations + 1):
            if self.checkpointing and torch.is_grad_enabled():
                fz = checkpoint(value, z, use_reentrant=False, preserve_rng_state=False)
            else:
                fz = value(z)
            steps.add(z, fz)
            z = fz if self.damping == 1 else torch.lerp(z, fz, self.damping)
            if i in indexing:
                states[i] = z
        return z, states, steps.solution(z)


@dataclass(frozen=True)
class Reversible(Iteration):
    """A coupled iteration that backward undoes, step by step (McCallum et al. 2025).

        y+ = (1 - b) y + b f(z),   z+ = (1 - b) z + b f(y+),   y_0 = z_0

    It converges to y = z = f(z), and can be solved for (y, z), so that nothing but the last pair
    is kept and the gradient is that of the iteration actually run. A step makes two of the
    ``f_thres`` evaluations of f; backward makes as many, with a product each.

    Undoing n steps grows rounding errors by (1 - b)^-n, and faster if f fed them back. So y and z
    are kept with more digits than f is given (float64, and an error term in f's own format): what
    f is given is then the same on the way back, bit for bit, as long as n is bounded. Backward
    checks that the start is recovered.

    Args:
        damping: b, in (0, 1).
    """

    damping: float = 0.75

    def __post_init__(self):
        good = is_number(self.damping) and 0 < self.damping < 1
        check(good, "damping", self.damping, "between 0 and 1: a full step cannot be undone")

    def refuse_threshold(self, evaluations: int, name: str = "f_thres", more: int = 0) -> None:
        # The error term makes the pair more precise than f by the digits of float64.
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
        """As above; two evaluations at least, and an even number of them.

        Raises:
            InputError: more steps than can be undone.
        """
        check_arguments(f, z0, evaluations)
        self.refuse_threshold(evaluations)
        n = max(evaluations // 2, 1)
        history = _History(f, z0, self.damping)
        start = z0.double(), torch.zeros_like(z0, dtype=history.rest)
        pair, states, steps = [start, start], {}, _Steps()  # y, z
        for i in range(1, 2 * n + 1):
            at, moved = _roles(i)
            point = pair[at][0].to(z0.dtype)
            fz = history.evaluate(i, point)
            if tangent_of(fz) is not None:
                raise InputError(
                    "grad reversible has no forward mode: take grad ift, jfb or phantom, or "
                    "reverse mode (backward)"
                )
            steps.add(point, fz)
            pair[moved] = _Damped.apply(*pair[moved], fz, self.damping)
            if i in indexing:
                states[i] = pair[moved][0].to(z0.dtype)
        history.close(pair)
        z = pair[1][0].to(z0.dtype)
        return z, states, steps.solution(z)


class _Damped(torch.autograd.Function):
    """(1 - b) x + b f for x = high + rest; keeps nothing for backward."""

    @staticmethod
    def forward(ctx, high: Tensor, rest: Tensor, fz: Tensor, b: float) -> tuple[Tensor, Tensor]:
        ctx.b, ctx.dtype = b, fz.dtype
        high, more = combine((high, rest.double()), fz.double(), 1 - b, b)
        more = more.to(rest.dtype)
        ctx.mark_non_differentiable(more)
        return high, more

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        return (1 - ctx.b) * grad, None, (ctx.b * grad).to(ctx.dtype), None


def _roles(i: int) -> tuple[int, int]:
    """Of the pair (y, z) in evaluation i (from 1): where f is evaluated, and which one moves."""
    return (1, 0) if i % 2 else (0, 1)


class _History:
    """What backward needs of a reversible iteration: the last pair, and how to go back from it.

    Tensors that autograd would save within f are only counted. When backward asks for the first
    one of an evaluation, the pair has been taken back to there, and f is evaluated once more: its
    saved tensors are handed out, and its value takes the pair one evaluation further back.
    Autograd asks in falling order, so that each evaluation is repeated once.
    """

    def __init__(self, f: Map, z0: Tensor, damping: float):
        self._f, self._dtype, self._damping = f, z0.dtype, damping
        self.rest = torch.promote_types(z0.dtype, torch.float32)  # format of the error terms
        self._start = z0.detach().clone()
        self._autocast = same_autocast(z0.device)
        self._evaluations: dict[int, dict] = {}  # by number, from 1 on
        self._end: list[Pair] = []
        self._pair: list[Pair] = []  # as it was after evaluation number _at
        self._at, self._open, self._values = 0, None, []

    def evaluate(self, i: int, point: Tensor) -> Tensor:
        """f at a point, whose saved tensors are not kept."""
        own = self._evaluations[i] = {"saved": 0, "trained": point.requires_grad}

        def count(t: Tensor) -> tuple[int, int]:
            own["saved"] += 1
            return i, own["saved"] - 1

        with saved_tensors_hooks(count, self._saved):
            return checked_value(self._f, point)

    def close(self, pair: list[Pair]) -> None:
        """The iteration has ended with this pair."""
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
        b, (high, rest) = self._damping, self._pair[moved]
        high, more = take_apart((high, rest.double()), fz.detach().double(), 1 - b, b)
        self._pair[moved] = high, more.to(rest.dtype)
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


class _Steps:
    """The residuals of an iteration, and the dict of its end."""

    def __init__(self):
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def add(self, z: Tensor, fz: Tensor) -> None:
        """Note an evaluation of f at z."""
        parts = [v.flatten(1).to(torch.promote_types(fz.dtype, torch.float32)) for v in (z, fz)]
        norms = [torch.linalg.vector_norm(v, dim=1) for v in (parts[1] - parts[0], parts[1])]
        self._norms.append(torch.stack(norms))

    def solution(self, z: Tensor) -> dict:
        """As a solver's dict (see :mod:`lib.solvers`), for the state z after the last one."""
        norms = torch.stack(self._norms).double().cpu().numpy()  # (n, 2, B)
        absolute, value = np.linalg.norm(norms, axis=2).T
        relative = absolute / (value + TINY)
        g, f = norms[-1]
        finite = np.isfinite(norms).all((0, 1))
        residual = g / (f + TINY)
        per_sample = {
            "residual": residual,
            "converged": residual == 0,
            "finite": finite,
            "sample_nfe": np.full(len(finite), len(norms)),
        }
        return {
            "result": z.detach(),
            "lowest": float(relative[-1]),
            "abs_lowest": float(absolute[-1]),
            "rel_lowest": float(relative[-1]),
            "nstep": len(norms) - 1,
            "prot_break": not np.isfinite(relative[-1]),
            "abs_trace": absolute.tolist(),
            "rel_trace": relative.tolist(),
            "nfe": len(norms),
            "products": 0,
            "reason": "threshold",
            "all_finite": bool(finite.all()),
            "norms": norms[-1],
            "eps": 0.0,  # there is no tolerance
            **{k: to_device(v, z.device) for k, v in per_sample.items()},
            "threshold": len(norms),
            "stop_mode": "rel",
        }
