"""Broyden's method."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import check, check_count
from lib.solvers.arguments import check_damping
from lib.solvers.maps import Map
from lib.solvers.norms import products, scaled_norms, to_device
from lib.solvers.sample_solve import start
from lib.solvers.solve import Solve, solver_method

# Blocks hold so many vectors, or so many bytes if that is more: few kernels, little unused memory.
_BLOCK_ROWS, _BLOCK_BYTES = 8, 2**20

_TRIALS, _SHORTER = 5, 0.1  # line search: number of trials, ratio of successive step lengths


@solver_method
def broyden(
    f: Map,
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
    *,
    memory: int | None = None,
    damping: float = 1.0,
    keep_inverse: bool = False,
    **control,
) -> dict:
    """Broyden's ("good") quasi-Newton method on g(z) = f(z) - z (Broyden 1965).

    H estimates the inverse Jacobian of g. H starts at -I, so the first step goes to f(x0). Then

        z+ = z - t H g(z),   H <- H + (dz - H dg) (H' dz)' / (dz' H dg)

    with t = ``damping``, or with t from a backtracking line search. Each sample has its own H.

    Args:
        f, x0, eps, stop_mode: as for :func:`~lib.solvers.anderson.anderson`.
        threshold: maximum number of updates. f is evaluated at x0 and at most ``threshold`` times
            more, plus the rejected trials of the line search.
        ls: shorten a step until ||g|| over the batch rises by no more than Li and Fukushima (2000)
            allow (a factor of 3.7 over the whole solve). There are at most five trials per step. If
            all are rejected, H learns from the shortest trial and the iterate stays where it is.
        name: label of the solve.
        memory: number of last updates that make up H, at two stored vectors each. None keeps all
            updates, at one vector each.
        damping: step length t, in (0, 1].
        keep_inverse: return H as "inverse", and as "updates" the number of those made on the way to
            the result. Not with stop='sample' or best='sample'.
        **control: see :class:`~lib.solvers.arguments.Control`; a line search needs stop='batch'.

    Returns:
        The dict that :mod:`lib.solvers` describes, plus ``name``.

    Raises:
        InputError: as for :func:`~lib.solvers.anderson.anderson`.
    """
    if memory is not None:
        check_count("memory", memory)
    check_damping(damping)
    per_sample = control.get("stop") == "sample"
    for option, value in (("ls", ls), ("keep_inverse", keep_inverse)):
        check(isinstance(value, bool), option, value, "True or False")
        check(not (value and per_sample), option, value, "False with stop='sample'")
    own = keep_inverse and control.get("best") == "sample"
    check(not own, "keep_inverse", keep_inverse, "False with best='sample'")
    check(not ls or damping == 1, "ls", ls, "False with a damping")
    solve = start(f, x0, threshold, eps, stop_mode, control, needs_all=ls)
    if memory is None:
        inverse = BroydenInverse(solve.x0, threshold)
    else:
        inverse = LimitedInverse(solve.x0, min(memory, threshold))
    x, _, gx = solve.evaluate(solve.x0, out=inverse.residual)
    value, length = 0.0, None  # for ``ls``: ||g(x)||; t of the step that H learns next
    at_x: Tensor | None = None  # g(x)
    if ls:
        value, at_x = solve.abs_trace[-1], gx.clone()
    steps, back = 0, False  # back: the line search rejected all trials; H learnt from the last
    taken = [0]  # indices of evaluations: at x0, then one per update of H
    for _ in range(threshold):
        if solve.stopped:
            break
        if solve.kept is not None:
            inverse.select(solve.kept)
        direction = inverse.newton_direction(length, solve.wide)
        if ls:
            if back and at_x is not None and length is not None:
                direction = inverse.return_to(at_x, length)
            trial = _line_search(solve, x, direction, value, steps)
            if trial is None:  # f was not finite at any trial: H has no step to learn from
                length = None
                break
            length, evaluation, back = trial.length, trial.evaluation, not trial.accepted
            inverse.residual.copy_(trial.residual)
            if trial.accepted:
                x, at_x, value, steps = trial.x, trial.residual, trial.value, steps + 1
        else:
            step = direction if damping == 1 else damping * direction
            x, _, _ = solve.evaluate(x + step, out=inverse.residual)
            length, evaluation = damping, solve.nfe - 1
        taken.append(evaluation)
    solution: dict = solve.result() | {"name": name}
    if keep_inverse:
        if length is not None:
            # The loop ended before the update from the last evaluation.
            inverse.newton_direction(length, solve.wide)
        updates = sum(evaluation <= solution["nstep"] for evaluation in taken) - 1
        solution |= {"inverse": inverse, "updates": updates}
    return solution


class BroydenInverse:
    r"""Broyden's inverse estimate H as a product of rank-one factors; stores only the directions.

    With directions d_j = -H_j g_j and steps s_j = t_j d_j, Sherman-Morrison gives

        H_{j+1} = (I + w_j d_j' / d_j'd_j) H_j,   w_j = d_{j+1} - (1 - t_j) d_j

    (unit steps: Kelley, Iterative Methods for Linear and Nonlinear Equations, section 7.3): one
    stored vector per update instead of two. Applying k factors to -g gives p + sum c_j w_j with
    c_j = d_j'p_j / d_j'd_j. The c_j solve a triangular system:

        d_j'd_j c_j - sum_{i<j} c_i (d_j'd_{i+1} - (1 - t_i) d_j'd_i) = -d_j'g

    It is solved in float64 from direct inner products: a recurrence would lose small residuals.

    The caller writes g at the newest point into ``residual`` (B, D).
    """

    def __init__(self, like: Tensor, capacity: int):
        batch, size = like.shape
        self._newest = like.new_empty(2, batch, size)
        self.direction, self.residual = self._newest
        self.capacity = capacity  # maximum number of directions
        self.blocks: list[Tensor] = []  # (rows, B, D), filled in order
        self.count = self._free = 0  # directions stored; rows left in the last block
        self.shortfall: list[float] = []  # 1 - t_j
        self._wide = False  # whether any call so far needed wide inner products
        self.triangle = torch.zeros(batch, 16, 16, dtype=torch.float64, device=like.device)

    def newton_direction(self, length: float | None, wide: bool = False) -> Tensor:
        """-H g, (B, D), overwritten by the next call; g is ``residual``.

        ``length`` is t of the step that led there, None at first.
        """
        self._wide |= wide
        if length is None:
            return self.direction.copy_(self.residual)  # H = -I
        self._store(length)
        coefficients = self._coefficients(wide)  # (B, k); the last multiplies the unknown w_k
        denominator = 1 + coefficients[:, -1:]
        # With a vanishing denominator there is no update: take the plain step g.
        usable = denominator.abs() > torch.finfo(torch.float64).eps
        scale = torch.where(usable, denominator.reciprocal(), 0.0)
        weights = F.pad(-scale * coefficients[:, :-1], (1, 0))
        if any(self.shortfall):
            weights += scale * self._like(self.shortfall, coefficients) * coefficients
        scale = torch.where(usable, scale, 1.0)

        torch.mul(self.residual, scale.to(self.residual.dtype), out=self.direction)
        self._add_directions(weights.to(self.residual.dtype))
        return self.direction

    def return_to(self, residual: Tensor, length: float) -> Tensor:
        """-H g, (B, D), for g = ``residual`` at the point before the last step, of length t.

        H has learnt from that step, which is not taken. Since H y = s, the direction is d+ + t d,
        with d+ = -H g+ at the end of the step. The factor of that update becomes one with t = 0.
        """
        before = list(self._filled())[-1][-1]
        self.shortfall[-1] = 1.0
        self.residual.copy_(residual)
        return self.direction.add_(before, alpha=length)

    def transposed(self, vector: Tensor, updates: int) -> Tensor:
        """H' v for v (B, D), with H after its first ``updates`` updates.

        The factors of H' are I + d_j w_j' / d_j'd_j; the factor of the last update comes first.
        """
        out = vector.clone()
        directions = [d for rows in self._filled() for d in rows] + [self.direction]
        for j in reversed(range(min(updates, self.count))):
            d, w = directions[j], directions[j + 1]
            if self.shortfall[j]:
                w = w - self.shortfall[j] * directions[j]
            norm, overlap = (
                products(a[None], b[None], self._wide)[:, 0] for a, b in ((d, d), (w, out))
            )
            share = overlap / torch.where(norm > 0, norm, 1.0)
            out += share.to(out.dtype) * d
        return out.neg_()

    def select(self, rows: Tensor) -> None:
        self._newest = self._newest[:, rows]
        self.direction, self.residual = self._newest
        self.blocks = [block[:, rows] for block in self.blocks]
        self.triangle = self.triangle[rows]

    def _store(self, length: float) -> None:
        """Store the newest direction, and t of the step along it."""
        if self._free == 0:
            _, batch, size = self._newest.shape
            fitting = _BLOCK_BYTES // (self.direction.nbytes or 1)
            self._free = min(max(_BLOCK_ROWS, fitting), self.capacity - self.count)
            self.blocks.append(self._newest.new_empty(self._free, batch, size))
        self.blocks[-1][-self._free] = self.direction
        self._free -= 1
        self.count += 1
        self.shortfall.append(1 - length)

    def _coefficients(self, wide: bool) -> Tensor:
        """Extend the triangular system by one row; return c of the class's docstring, float64."""
        k = self.count - 1
        if k == self.triangle.shape[1]:
            self.triangle = F.pad(self.triangle, (0, k, 0, k))
        parts = [products(self._newest, rows, wide) for rows in self._filled()]
        overlaps = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # (B, 2, k + 1)
        own, right = overlaps[:, 0], overlaps[:, 1].neg()
        row = self.triangle[:, k, : k + 1]
        torch.neg(own[:, 1:], out=row[:, :-1])
        if any(self.shortfall):
            row[:, :-1] += self._like(self.shortfall[:-1], own) * own[:, :-1]
        norm = own[:, -1]
        row[:, -1] = torch.where(norm > 0, norm, 1.0)
        system = self.triangle[:, : k + 1, : k + 1]
        return torch.linalg.solve_triangular(system, right[:, :, None], upper=False)[:, :, 0]

    def _add_directions(self, weights: Tensor) -> None:
        """direction += sum_j weights_j d_j, for weights (B, k)."""
        out, first = self.direction[:, None], 0
        for rows in self._filled():
            part = weights[:, None, first : first + len(rows)]
            out.baddbmm_(part, rows.transpose(0, 1))
            first += len(rows)

    def _filled(self):
        yield from self.blocks[:-1]
        for last in self.blocks[-1:]:
            yield last[: len(last) - self._free]

    @staticmethod
    def _like(values: list[float], like: Tensor) -> Tensor:
        return to_device(np.array(values), like)


class LimitedInverse:
    r"""H from the last updates alone, as if the iteration had started with them, from -I.

    The columns s_j of S are the steps, scaled to unit length. y_j is the change of the residual
    along s_j. Broyden's updates in this order give (Byrd, Nocedal and Schnabel 1994)

        H = -I + W M^-1 S',   w_j = s_j + y_j,   M_ij = s_i'w_j for i after j, else s_i'y_j

    So a new update overwrites the oldest vectors, and a row and a column of M. (A sum of rank-one
    terms without its oldest would diverge on plain contractions: the later ones belong to another
    H.)

    The methods are those of :class:`BroydenInverse`; ``transposed`` uses the stored updates alone.
    """

    def __init__(self, like: Tensor, memory: int):
        batch, size = like.shape
        self.memory, self.count = memory, 0  # maximum number of stored updates; updates so far
        self.residual, self._before = torch.empty_like(like), torch.empty_like(like)
        self.direction, self._wide = torch.empty_like(like), False
        self._s, self._w = like.new_empty(2, memory, batch, size)
        self._m = torch.zeros(batch, memory, memory, dtype=torch.float64, device=like.device)

    def newton_direction(self, length: float | None, wide: bool = False) -> Tensor:
        self._wide |= wide
        if length is not None:
            self._store(length)
        self._before.copy_(self.residual)
        slots = slice(min(self.count, self.memory))
        image = self._times(self.residual, self._w, self._m, self._s, slots)
        return torch.neg(image, out=self.direction)

    def return_to(self, residual: Tensor, length: float) -> Tensor:
        self.residual.copy_(residual)
        return self.newton_direction(None)

    def transposed(self, vector: Tensor, updates: int) -> Tensor:
        held = range(max(self.count - self.memory, 0), min(self.count, updates))
        slots = [j % self.memory for j in held]
        return self._times(vector, self._s, self._m.mT, self._w, slots)

    def select(self, rows: Tensor) -> None:
        self.residual, self._before = self.residual[rows], self._before[rows]
        self.direction, self._m = self.direction[rows], self._m[rows]
        self._s, self._w = self._s[:, rows], self._w[:, rows]

    def _store(self, length: float) -> None:
        """Store the update from the newest step, of length t."""
        slot = self.count % self.memory
        self.count += 1
        n = min(self.count, self.memory)
        size = scaled_norms(self.direction).to(self.direction)[:, None]  # (B, 1)
        moved = size > 0
        size = torch.where(moved, size, 1.0)
        change = (self.residual - self._before) / (length * size)
        torch.div(self.direction, size, out=self._s[slot])
        torch.add(self._s[slot], change, out=self._w[slot])
        self._m[:, slot, :n] = products(self._s[slot][None], self._w[:n])[:, 0]
        self._m[:, :n, slot] = products(change[None], self._s[:n])[:, 0]
        own = self._m[:, slot, slot]
        own.copy_(torch.where(moved[:, 0], own, 1.0))  # a sample at rest has no update

    def _times(self, vector: Tensor, left: Tensor, m: Tensor, right: Tensor, slots) -> Tensor:
        """-v + L M^-1 R'v from the updates in ``slots``; -v for a sample whose M is singular."""
        left, m, right = left[slots], m[:, slots][:, :, slots], right[slots]
        if len(left) == 0:
            return -vector
        overlaps = products(vector[None], right, self._wide).mT  # (B, n, 1)
        weights, failed = torch.linalg.solve_ex(m, overlaps)
        weights = torch.where(failed.view(-1, 1, 1) == 0, weights, 0.0).mT.to(vector.dtype)
        return torch.baddbmm(vector[:, None], weights, left.transpose(0, 1), beta=-1)[:, 0]


@dataclass
class _Trial:
    """A trial of the line search."""

    x: Tensor
    residual: Tensor
    value: float  # ||residual|| over the batch
    length: float
    evaluation: int  # its index
    accepted: bool


def _line_search(
    solve: Solve, x: Tensor, direction: Tensor, value: float, step: int
) -> _Trial | None:
    """Shorten t from 1 until ||g(x + t d)|| <= (1 + eta - 1e-4 t^2) ||g(x)||.

    This is the rule of Li and Fukushima (2000), with t^2 ||g(x)|| for their ||t d||^2: nothing
    depends on the scale of z. It needs no slope: Broyden's direction need not be one of descent.
    eta is 1 / (step + 1)^2.

    Returns:
        The first trial that meets the rule, else the shortest; None if f was finite at none.
    """
    length, last = 1.0, None
    for left in reversed(range(_TRIALS)):
        # A shorter step often stays finite: lose a sample only if no trial was finite.
        evaluate = solve.trial if left > 0 or last is not None else solve.evaluate
        point = evaluate(x + length * direction)
        if point is not None:
            found = solve.abs_trace[-1]
            fits = found <= (1 + 1 / (step + 1) ** 2 - 1e-4 * length**2) * value
            last = _Trial(point[0], point[2], found, length, solve.nfe - 1, fits)
        if solve.stopped or (last is not None and last.accepted):
            break
        length *= _SHORTER
    return last
