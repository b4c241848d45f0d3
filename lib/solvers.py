"""Fixed-point solvers: find z with f(z) = z.

Every solver has the signature ``solver(f, x0, threshold=..., eps=..., stop_mode=...) -> dict`` and
is listed by name in :data:`SOLVERS`. A method only knows how to propose its next point; the class
:class:`_Run` evaluates f there, keeps the residual traces and the best point, finds samples that
are no longer finite, and decides when to stop.

Example::

    >>> import torch
    >>> from lib.solvers import anderson
    >>> solution = anderson(torch.cos, torch.zeros(1, 1), eps=1e-6)
    >>> round(solution["result"].item(), 4), bool(solution["converged"].all())
    (0.7391, True)

What a solver returns
    ========== ===========================================================================
    result     visited point z of the lowest residual, shape and dtype of ``x0``; a sample
               that is not finite there holds its own best finite iterate
    lowest     residual of that point over the whole batch, in ``stop_mode``
    nstep      index of that point in the traces
    abs_trace  ||f(z) - z|| over the batch, a float per evaluated point, from ``x0`` on
    rel_trace  ||f(z) - z|| / ||f(z)||, likewise
    prot_break True if the solver gave up: the iteration diverged or nothing stayed finite
    nfe        number of evaluations of f (the length of the traces)
    converged  (batch,) bool: the sample's own residual at ``result`` is below ``eps``
    residual   (batch,) that residual, in ``stop_mode``; inf if f was never finite
    finite     (batch,) bool: f stayed finite for this sample at every evaluated point
    eps, threshold, stop_mode  as given
    ========== ===========================================================================

Not converging is a status in this dict; misuse is an :class:`~lib.errors.InputError`.
Nothing is differentiated here (see :mod:`lib.deq`), so solvers run under ``torch.no_grad``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib.errors import InputError

# A residual this many times the first one is a diverging iteration. Measured on the absolute
# residual in both stop modes: the relative residual of z -> 3 z stays at 2/3 for ever.
DIVERGENCE_FACTOR = 1e6

# Steps of Broyden's method are stored in blocks of this many: few kernels, little unused memory.
_BLOCK = 8


class _Run:
    """One solve: evaluates f, records residuals, holds the best point, decides when to stop.

    Points are (B, D) tensors in the working dtype: that of ``x0``, but float32 for half
    precision, whose inner products would not carry a solver. f sees the shape and dtype of x0.
    """

    def __init__(self, f: Callable, x0: Tensor, threshold: int, eps: float, stop_mode: str):
        _check_arguments(f, x0, threshold, eps, stop_mode)
        self.f = f
        self.shape, self.dtype = x0.shape, x0.dtype
        self.threshold, self.eps, self.stop_mode = threshold, float(eps), stop_mode
        self.work_dtype = torch.promote_types(x0.dtype, torch.float32)
        self.x0 = x0.detach().reshape(len(x0), -1).to(self.work_dtype)  # (B, D)
        self.abs_trace: list[float] = []
        self.rel_trace: list[float] = []
        self.best, self.best_index, self.lowest = self.x0, 0, math.inf
        self.best_residual = torch.full((len(x0),), math.inf, device=x0.device)
        self.lost = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        self.any_lost = self.converged = self.diverged = False
        self.limit = math.inf  # of the absolute residual
        # The best finite iterate of each sample: what a sample falls back to once f fails on it.
        self.own_best, self.own_residual = self.x0, self.best_residual

    @property
    def stopped(self) -> bool:
        return self.converged or self.diverged

    def evaluate(self, x: Tensor, forgive: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
        """Evaluate f at x (B, D): returns (x, f(x), f(x) - x), all finite.

        A sample on which f is not finite is lost: from then on it rests at its best finite
        iterate with a residual of zero, so that it neither moves nor disturbs its batch mates.
        With ``forgive`` (a line search's trial) None is returned instead and nothing is lost.
        """
        if self.any_lost:
            x = self._settle(x, self.own_best)
        z = x.to(self.dtype)
        fz = self.f(z.view(self.shape))
        if not isinstance(fz, Tensor) or fz.shape != self.shape:
            found = tuple(fz.shape) if isinstance(fz, Tensor) else type(fz).__name__
            raise InputError(f"f must map {tuple(self.shape)} to the same shape, but gave {found}")
        x = z.to(self.work_dtype)  # half precision rounds: the residual belongs to the point used
        fx = fz.detach().reshape(x.shape).to(self.work_dtype)
        gx = self._settle(fx - x, 0.0) if self.any_lost else fx - x

        g2, f2 = self._squares(gx, fx)
        total_g, total_f, all_better, any_better, better, residual = self._compare(g2, f2)
        if not math.isfinite(total_g + total_f):
            if forgive:
                self._record(math.inf, math.inf)
                return None
            self.lost |= ~torch.isfinite(g2 + f2)
            self.any_lost = True
            if bool(self.lost.all()):
                self._record(math.inf, math.inf)
                self.diverged = True
                return self.own_best, self.own_best, torch.zeros_like(x)
            x, gx = self._settle(x, self.own_best), self._settle(gx, 0.0)
            fx = self._settle(fx, self.own_best)
            g2, f2 = self._squares(gx, fx)
            total_g, total_f, all_better, any_better, better, residual = self._compare(g2, f2)

        self._record(math.sqrt(total_g), math.sqrt(total_g) / (math.sqrt(total_f) + _TINY))
        if all_better:  # the usual step: a reference, not a copy
            self.own_best, self.own_residual = x, residual
        elif any_better:
            self.own_best = torch.where(better[:, None], x, self.own_best)
            self.own_residual = torch.where(better, residual, self.own_residual)
        current = self.abs_trace[-1] if self.stop_mode == "abs" else self.rel_trace[-1]
        if current < self.lowest:
            self.best, self.best_index, self.lowest = x, len(self.abs_trace) - 1, current
            self.best_residual = residual
        self.converged = current < self.eps or current == 0.0
        if len(self.abs_trace) == 1:
            # A warm start may have a residual of rounding errors, whose growth says nothing.
            floor = math.sqrt(torch.finfo(self.work_dtype).eps) * math.sqrt(total_f)
            self.limit = DIVERGENCE_FACTOR * max(self.abs_trace[0], floor)
        self.diverged = self.abs_trace[-1] > self.limit
        return x, fx, gx

    def result(self) -> dict:
        residual = self.best_residual
        return {
            "result": self.best.to(self.dtype).view(self.shape),
            "lowest": self.lowest,
            "nstep": self.best_index,
            "prot_break": self.diverged and not self.converged,
            "abs_trace": self.abs_trace,
            "rel_trace": self.rel_trace,
            "nfe": len(self.abs_trace),
            "converged": (residual < self.eps) | (residual == 0),
            "residual": residual,
            "finite": ~self.lost,
            "eps": self.eps,
            "threshold": self.threshold,
            "stop_mode": self.stop_mode,
        }

    def _settle(self, x: Tensor, rest: Tensor | float) -> Tensor:
        """Replace the lost samples of x by ``rest``: chosen, since NaN times zero is NaN."""
        return torch.where(self.lost[:, None], rest, x)

    def _squares(self, gx: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
        """||g||^2 and ||f||^2 per sample (B,) in float64; zero for the lost ones."""
        norms = [torch.linalg.vector_norm(t, dim=1).double().square() for t in (gx, fx)]
        return tuple(t.masked_fill(self.lost, 0.0) for t in norms) if self.any_lost else norms

    def _compare(self, g2: Tensor, f2: Tensor):
        """Totals over the batch, and which samples are better than ever: one synchronisation."""
        residual = g2.sqrt() if self.stop_mode == "abs" else g2.sqrt() / (f2.sqrt() + _TINY)
        residual = residual.masked_fill(self.lost, math.inf) if self.any_lost else residual
        better = residual < self.own_residual
        # What is lost keeps its own best iterate and that iterate's residual.
        settled = torch.where(self.lost, self.own_residual, residual)
        summary = [g2.sum(), f2.sum(), (better | self.lost).all(), better.any()]
        total_g, total_f, all_better, any_better = torch.stack(
            [value.double() for value in summary]
        ).tolist()
        return total_g, total_f, bool(all_better), bool(any_better), better, settled

    def _record(self, absolute: float, relative: float) -> None:
        self.abs_trace.append(absolute)
        self.rel_trace.append(relative)


_TINY = 1e-30  # keeps 0 / 0 out of the relative residual of f = 0; far below any real norm


@torch.no_grad()
def fixed_point_iteration(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
) -> dict:
    """Plain (Picard) iteration z_{k+1} = f(z_k); converges where f is a contraction.

    Args and result as for :func:`anderson`; ``threshold`` counts evaluations of f.
    """
    run = _Run(f, x0, threshold, eps, stop_mode)
    _, fx, _ = run.evaluate(run.x0)
    while not run.stopped and len(run.abs_trace) < threshold:
        _, fx, _ = run.evaluate(fx)
    return run.result()


@torch.no_grad()
def anderson(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    m: int = 6,
    lam: float | None = None,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    beta: float = 1.0,
) -> dict:
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011), as used by DEQ models.

    z_1 = f(z_0); then, with G the residuals g_i = f(z_i) - z_i of the last n = min(m, k) points,

        a = argmin ||sum a_i g_i||^2 + ridge,  sum a_i = 1
        z_k = beta sum a_i f(z_i) + (1 - beta) sum a_i z_i

    which is the system [[0, 1'], [1, G G' + lam I]] [nu; a] = [1; 0], solved per sample.

    Args:
        f: maps (B, ...) to the same shape.
        x0: start, (B, ...) of any rank and floating dtype, finite.
        m: number of past points that are mixed, at least 1 (1 is plain iteration).
        lam: absolute ridge, as published (1e-4 there). It swamps the system near the solution,
            so the default None takes a ridge of a few rounding errors relative to each ||g_i||^2.
        threshold: evaluations of f at most, the two before the first mixing included.
        eps: stop once the residual over the batch is below this.
        stop_mode: 'abs' for ||f(z) - z||, 'rel' for ||f(z) - z|| / ||f(z)||.
        beta: mixing; 1 uses the f(z_i) alone.

    Returns:
        The dict that the module's docstring describes.

    Raises:
        InputError: an argument out of range, ``x0`` not finite, or f changing the shape.
    """
    _check(isinstance(m, int) and m >= 1, "m", m, "an integer of at least 1")
    _check(lam is None or lam >= 0, "lam", lam, "None or a number of at least 0")
    _check(beta > 0, "beta", beta, "a number above 0")
    run = _Run(f, x0, threshold, eps, stop_mode)
    _, fx, gx = run.evaluate(run.x0)
    batch, size = gx.shape
    m = min(m, threshold)
    residuals = gx.new_empty(batch, m, size)
    mixed = gx.new_empty(batch, m, size)  # beta f(z_i) + (1 - beta) z_i
    gram = torch.zeros(batch, m, m, dtype=torch.float64, device=gx.device)
    while not run.stopped and len(run.abs_trace) < threshold:
        k = len(run.abs_trace)
        slot, n = (k - 1) % m, min(k, m)
        residuals[:, slot] = gx
        mixed[:, slot] = fx if beta == 1 else fx - (1 - beta) * gx
        row = torch.bmm(residuals[:, :n], gx[:, :, None]).squeeze(2).double()  # (B, n)
        gram[:, slot, :n] = gram[:, :n, slot] = row
        if k == 1:
            _, fx, gx = run.evaluate(fx)
            continue
        weights = _anderson_weights(gram[:, :n, :n], slot, lam, torch.finfo(gx.dtype).eps)
        x = torch.bmm(weights[:, None].to(gx.dtype), mixed[:, :n]).squeeze(1)
        _, fx, gx = run.evaluate(x)
    return run.result()


def _anderson_weights(gram: Tensor, newest: int, lam: float | None, ulp: float) -> Tensor:
    """Weights a (B, n), summing to one, that minimise a' (G G' + ridge) a.

    Scaled to a unit diagonal first, so that the conditioning does not depend on how far the
    residuals have fallen. Falls back to the newest point where the system is singular.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)  # (B, n)
    scale = diagonal if lam is None else diagonal + lam
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    system = gram * scale[:, :, None] * scale[:, None, :]
    ridge = 10 * ulp * torch.ones_like(scale) if lam is None else lam * scale.square()
    system = system + torch.diag_embed(ridge)
    solution, singular = torch.linalg.solve_ex(system, scale)  # K a = 1 up to a factor
    weights = solution * scale
    weights = weights / weights.sum(1, keepdim=True)
    usable = (singular == 0) & weights.isfinite().all(1)
    plain = torch.zeros_like(weights)
    plain[:, newest] = 1.0
    return torch.where(usable[:, None], weights, plain)


@torch.no_grad()
def broyden(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
) -> dict:
    """Broyden's ("good") quasi-Newton method on g(z) = f(z) - z, full memory (Broyden 1965).

    The inverse Jacobian estimate H of g starts at -I, so the first step goes to f(x0); then

        z+ = z - t H g(z),   H <- H + (dz - H dg) (H' dz)' / (dz' H dg)

    with t = 1, or chosen by a backtracking line search. All of H is per sample.

    Args:
        f, x0, eps, stop_mode: as for :func:`anderson`.
        threshold: updates at most: f is evaluated at x0 and at most this often more (plus the
            rejected trials of the line search).
        ls: Armijo line search on ||g||^2 over the batch (at most 4 halvings or so per step).
        name: label of the solve, handed back in the result.

    Returns:
        The dict that the module's docstring describes, and ``name``.

    Raises:
        InputError: as for :func:`anderson`.
    """
    run = _Run(f, x0, threshold, eps, stop_mode)
    x, _, gx = run.evaluate(run.x0)
    inverse = _BroydenInverse(x)
    updates = 0
    while not run.stopped and updates < threshold:
        direction = inverse.newton_direction(gx)
        if ls:
            x, gx, length = _line_search(run, x, direction)
        else:
            length = 1.0
            x, _, gx = run.evaluate(x + direction)
        inverse.append(direction if length == 1.0 else length * direction, length)
        updates += 1
    return {**run.result(), "name": name}


class _BroydenInverse:
    r"""Broyden's inverse estimate H as a product of rank-one factors in the steps alone.

    With s_j = t_j d_j the steps taken, Sherman-Morrison gives H_{j+1} = (I + w_j s_j' / s_j's_j)
    H_j, and since the next step is -t H_{j+1} g it is found that

        w_j = (t_j / t_{j+1}) s_{j+1} - (1 - t_j) s_j

    (w_j = s_{j+1} for unit steps: Kelley, Iterative Methods for Linear and Nonlinear Equations,
    section 7.3). So one vector per update is stored instead of two. Applying the factors to x
    needs the inner products s_j'x and one triangular system in c_j = s_j'x_j / s_j's_j, which is
    solved in float64 from direct inner products: a recurrence would lose the small residuals.
    """

    def __init__(self, like: Tensor):
        self.blocks: list[Tensor] = []  # (B, _BLOCK, D), filled in order
        self.count = 0
        self.lengths: list[float] = []
        self.like = like
        self.triangle = torch.zeros(
            len(like), _BLOCK, _BLOCK, dtype=torch.float64, device=like.device
        )
        self.norms = self.triangle.new_zeros(len(like))  # ||s||^2 of the newest step

    def append(self, step: Tensor, length: float) -> None:
        """Add the step s = length * direction that was taken."""
        k = self.count
        if k % _BLOCK == 0:
            batch, size = step.shape
            self.blocks.append(step.new_empty(batch, _BLOCK, size))
        self.blocks[-1][:, k % _BLOCK] = step
        self.count, self.lengths = k + 1, [*self.lengths, length]
        if k == self.triangle.shape[1]:
            self.triangle = torch.nn.functional.pad(self.triangle, (0, k, 0, k))
        gram_row = self._products(step)  # s_k's_j for j <= k
        ratio, rest = self._factors(gram_row)
        # Row k of the system: s_k'w_i for the factors i < k, which the steps up to k make.
        self.triangle[:, k, :k] = -(ratio * gram_row[:, 1:] + rest * gram_row[:, :-1])
        self.norms = gram_row[:, k]
        self.triangle[:, k, k] = torch.where(self.norms > 0, self.norms, 1.0)

    def newton_direction(self, gx: Tensor) -> Tensor:
        """-H g with H updated by the newest step, whose end has the residual g (B, D)."""
        if self.count == 0:
            return gx  # H = -I
        k = self.count
        # p = H_{k-1} g = -g + sum_i c_i w_i; the last unknown of the system is sigma = s_k'p.
        system = self.triangle[:, :k, :k].clone()
        system[:, -1, -1] = 1.0
        right = -self._products(gx)
        solution = torch.linalg.solve_triangular(system, right[:, :, None], upper=False)[:, :, 0]
        sigma = solution[:, -1]  # (B,)
        weights = torch.zeros_like(solution)  # p = -g + sum weights_j s_j
        ratio, rest = self._factors(solution)
        weights[:, 1:] += ratio * solution[:, :-1]
        weights[:, :-1] += rest * solution[:, :-1]

        length = self.lengths[-1]
        delta = self.norms / length + sigma
        # A vanishing denominator (or a zero step) has no update: take the plain step g.
        usable = delta.abs() > torch.finfo(torch.float64).eps * self.norms
        delta = torch.where(usable, delta, 1.0)
        scale = torch.where(usable, self.norms / length / delta, 1.0)
        weights = -scale[:, None] * weights
        weights[:, -1] += (1 / length - 1) * sigma / delta
        weights = torch.where(usable[:, None], weights, 0.0)
        return self._combine(weights.to(gx.dtype), scale.to(gx.dtype)[:, None] * gx)

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of w_i in (s_{i+1}, s_i) for the complete factors, (k - 1,) each."""
        lengths = torch.tensor(self.lengths, dtype=torch.float64, device=like.device)
        return lengths[:-1] / lengths[1:], lengths[:-1] - 1

    def _products(self, x: Tensor) -> Tensor:
        """s_j'x for every step j, (B, k) in float64."""
        parts = [torch.bmm(block, x[:, :, None]).squeeze(2) for block in self._filled()]
        return torch.cat(parts, dim=1).double()

    def _combine(self, weights: Tensor, start: Tensor) -> Tensor:
        """start + sum_j weights_j s_j, (B, D); ``start`` is overwritten."""
        out, first = start[:, None], 0
        for block in self._filled():
            n = block.shape[1]
            out.baddbmm_(weights[:, None, first : first + n], block)
            first += n
        return out.squeeze(1)

    def _filled(self):
        for index, block in enumerate(self.blocks):
            yield block[:, : min(_BLOCK, self.count - index * _BLOCK)]


def _line_search(run: _Run, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, float]:
    """Backtrack t from 1 until ||g(x + t d)||^2 falls by the Armijo share; else the best trial.

    Returns the point taken, its residual g, and t. The model parabola has the value ||g||^2 and
    the slope -2 ||g||^2 at t = 0, those of a Newton direction.
    """
    tries, share = 5, 1e-4
    start = run.abs_trace[-1] ** 2
    length, best = 1.0, None
    for left in reversed(range(tries)):
        # Only the last resort may lose a sample: a shorter step often stays finite.
        point = run.evaluate(x + length * direction, forgive=left > 0 or best is not None)
        value = run.abs_trace[-1] ** 2
        if point is not None and (best is None or value < best[0]):
            best = (value, point[0], point[2], length)
        if run.stopped or value <= (1 - 2 * share * length) * start:
            break
        curvature = value - start + 2 * start * length
        shorter = start * length**2 / curvature if 0 < curvature < math.inf else 0.0
        length = min(max(shorter, 0.1 * length), 0.5 * length)
    _, point, gx, length = best
    return point, gx, length


SOLVERS: dict[str, Callable[..., dict]] = {
    "anderson": anderson,
    "broyden": broyden,
    "fixed_point_iteration": fixed_point_iteration,
}


def get_solver(solver: str | Callable[..., dict]) -> Callable[..., dict]:
    """The solver of that name, or the callable itself (say ``partial(broyden, eps=1e-9)``).

    Raises:
        InputError: a name that is not in :data:`SOLVERS`, listing those that are.
    """
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}: choose from {', '.join(sorted(SOLVERS))}")
    return SOLVERS[solver]


def _check(condition: bool, name: str, value, accepted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}, but must be {accepted}")


def _check_arguments(f, x0, threshold, eps, stop_mode) -> None:
    _check(callable(f), "f", f, "a function of the state")
    _check(isinstance(x0, Tensor), "x0", type(x0).__name__, "a tensor (see list2vec for lists)")
    _check(x0.is_floating_point(), "dtype of x0", x0.dtype, "a floating dtype")
    _check(x0.dim() >= 1 and x0.numel() > 0, "shape of x0", tuple(x0.shape), "(batch, ...)")
    integer = isinstance(threshold, int) and not isinstance(threshold, bool)
    _check(integer and threshold >= 1, "threshold", threshold, "an integer of at least 1")
    _check(eps >= 0, "eps", eps, "a number of at least 0")
    _check(stop_mode in ("abs", "rel"), "stop_mode", stop_mode, "'abs' or 'rel'")
    _check(bool(torch.isfinite(x0).all()), "x0", "not finite", "finite everywhere")
