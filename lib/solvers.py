"""Fixed-point solvers: find z with f(z) = z.

Every solver has the signature ``solver(f, x0, threshold=..., eps=..., stop_mode=...) -> dict`` and
is listed by name in :data:`SOLVERS`. A method only knows how to propose its next point; a
:class:`~lib.solver_run.Run` evaluates f there, keeps the residual traces and the best point, finds
samples that are no longer finite, and decides when to stop.

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

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import InputError
from lib.solver_run import Run, check, solver_method

# Stored vectors come in blocks: few kernels, little unused memory.
_BLOCK_ROWS, _BLOCK_BYTES = 8, 2**20  # whichever is more
# Inner products of vectors longer than this are summed over chunks, see _products.
_LONG, _CHUNK = 4096, 512


@solver_method
def fixed_point_iteration(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    check_every: int = 1,
    floor: float = 0.0,
) -> dict:
    """Plain (Picard) iteration z_{k+1} = f(z_k); converges where f is a contraction.

    Args and result as for :func:`anderson`; ``threshold`` counts evaluations of f.
    """
    run = Run(f, x0, threshold, eps, stop_mode, check_every, floor)
    _, fx, gx = run.evaluate(run.x0)
    while not run.stopped and run.nfe < threshold:
        _, fx, _ = run.evaluate(fx, out=gx)
    return run.result()


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
    check_every: int = 1,
    floor: float = 0.0,
) -> dict:
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011), as used by DEQ models.

    z_1 = f(z_0); then, with G the residuals g_i = f(z_i) - z_i of the last n = min(m, k) points,

        a = argmin ||sum a_i g_i||^2 + ridge,  sum a_i = 1
        z_k = beta sum a_i f(z_i) + (1 - beta) sum a_i z_i

    which is the system [[0, 1'], [1, G G' + lam I]] [nu; a] = [1; 0], solved per sample.

    Args:
        f: maps (B, ...) to the same shape, into a tensor of its own at every call.
        x0: start, (B, ...) of any rank and floating dtype, finite.
        m: number of past points that are mixed, at least 1 (1 is plain iteration).
        lam: absolute ridge, as published (1e-4 there). It swamps the system near the solution,
            so the default None takes a ridge of a few rounding errors relative to each ||g_i||^2
            (1.2e-6 in float32, 1e-13 in float64).
        threshold: evaluations of f at most, the two before the first mixing included.
        eps: stop once the residual over the batch is below this.
        stop_mode: 'abs' for ||f(z) - z||, 'rel' for ||f(z) - z|| / ||f(z)||.
        beta: mixing; 1 uses the f(z_i) alone.
        check_every: look at the residual only every so many evaluations. Between checks a GPU
            need not wait for the host; up to ``check_every - 1`` evaluations may be done in vain,
            and as many more points are held. The point returned is the best one all the same.
        floor: stop as well, in either mode, once ||f(z) - z|| / ||f(z)|| is below this: where
            the rounding of f itself begins, say.

    Returns:
        The dict that the module's docstring describes.

    Raises:
        InputError: an argument out of range, ``x0`` not finite, or f changing the shape.
    """
    check(isinstance(m, int) and m >= 1, "m", m, "an integer of at least 1")
    check(lam is None or lam >= 0, "lam", lam, "None or a number of at least 0")
    check(beta > 0, "beta", beta, "a number above 0")
    run = Run(f, x0, threshold, eps, stop_mode, check_every, floor)
    past = _AndersonWindow(run.x0, m=min(m, threshold), lam=lam)
    _, fx, gx = run.evaluate(run.x0, out=past.residual[0])
    while not run.stopped and run.nfe < threshold:
        newest, n = (run.nfe - 1) % past.m, min(run.nfe, past.m)
        past.value[newest].copy_(fx if beta == 1 else fx - (1 - beta) * gx)
        past.renew_gram(newest, n)
        # At first a plain step, into a tensor that is neither the caller's nor the window's.
        x = fx.clone() if run.nfe == 1 else past.combination(newest, n)
        _, fx, gx = run.evaluate(x, out=past.residual[run.nfe % past.m])
    return run.result()


class _AndersonWindow:
    """The last m points: residuals g_i, values h_i = beta f(z_i) + (1 - beta) z_i, Gram matrix.

    ``residual`` and ``value``, m tensors (B, D) each, are written by the caller, in turn.
    """

    _ABSENT = 1e300  # ||g||^2 of a point that is not there yet, so that it gets no weight

    def __init__(self, like: Tensor, m: int, lam: float | None):
        batch, size = like.shape
        self.m = m
        self._residuals = like.new_empty(m, batch, size)
        self._values = like.new_empty(m, batch, size)
        eye = torch.eye(m, dtype=torch.float64, device=like.device)
        self._gram = self._ABSENT * eye.expand(batch, m, m)
        self._ones = eye.new_ones(batch, m, 1)
        # Relative: above the rounding errors of the products, so that the system stays positive
        # definite.
        rounding = max(10 * torch.finfo(like.dtype).eps, 1e-13)
        self._scale = 1 + rounding * eye if lam is None else None
        self._shift = None if lam is None else lam * eye
        # Made once: at small states indexing costs as much as the products.
        self.residual, self.value = self._residuals.unbind(), self._values.unbind()
        self._row, self._column = self._gram.unbind(1), self._gram.unbind(2)
        self._unit = eye.unbind()

    def renew_gram(self, newest: int, n: int) -> None:
        """Products of the residual ``newest`` with those of the n points there are."""
        residuals, row, column = self._residuals, self._row[newest], self._column[newest]
        if n < self.m:
            residuals, row, column = residuals[:n], row[:, :n], column[:, :n]
        products = _products(self.residual[newest][None], residuals).squeeze(1)  # (B, n)
        row.copy_(products)
        column.copy_(products)

    def combination(self, newest: int, n: int) -> Tensor:
        """sum a_i h_i over the n points there are, (B, D)."""
        weights, values = self._weights(newest), self._values
        if n < self.m:
            weights, values = weights[:, :, :n], values[:n]
        return torch.bmm(weights.to(values.dtype), values.transpose(0, 1)).squeeze(1)

    def _weights(self, newest: int) -> Tensor:
        """Weights a (B, 1, m), summing to one, that minimise a' (G + ridge) a.

        By Cholesky factors, whose accuracy does not depend on how different the lengths of the
        residuals are. A sample without them (an absolute ridge that is too small) takes the plain
        step from the newest point.
        """
        system = self._gram * self._scale if self._shift is None else self._gram + self._shift
        factor, failed = torch.linalg.cholesky_ex(system)
        solution = torch.cholesky_solve(self._ones, factor).mT  # K a = 1 up to a factor
        weights = solution / solution.sum(2, keepdim=True)
        return torch.where(failed.view(-1, 1, 1) == 0, weights, self._unit[newest])


def _products(vectors: Tensor, rows: Tensor) -> Tensor:
    """Inner products of vectors (v, B, D) with rows (r, B, D), per sample: (B, v, r) in float64.

    They are cut into short chunks, whose sums are added in float64: more accurate, and with long
    ones MKL spends up to twice the time of reading the rows on packing them.
    """
    v, batch, size = vectors.shape
    parts = _chunks(size)
    if parts == 1:
        return torch.bmm(vectors.transpose(0, 1), rows.permute(1, 2, 0)).double()
    chunked = [t.view(-1, batch * parts, size // parts) for t in (vectors, rows)]
    products = torch.bmm(chunked[0].transpose(0, 1), chunked[1].permute(1, 2, 0))
    return products.view(batch, parts, v, -1).sum(1, dtype=torch.float64)


@functools.cache
def _chunks(size: int) -> int:
    """Into how many chunks: as many as divide ``size`` and leave ``_CHUNK`` or more in each."""
    if size <= _LONG:
        return 1
    return next((n for n in range(size // _CHUNK, 1, -1) if size % n == 0), 1)


@solver_method
def broyden(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
    *,
    check_every: int = 1,
    floor: float = 0.0,
) -> dict:
    """Broyden's ("good") quasi-Newton method on g(z) = f(z) - z, full memory (Broyden 1965).

    The inverse Jacobian estimate H of g starts at -I, so the first step goes to f(x0); then

        z+ = z - t H g(z),   H <- H + (dz - H dg) (H' dz)' / (dz' H dg)

    with t = 1, or chosen by a backtracking line search. All of H is per sample.

    Args:
        f, x0, eps, stop_mode, check_every, floor: as for :func:`anderson`; a line search checks
            always.
        threshold: updates at most: f is evaluated at x0 and at most this often more (plus the
            rejected trials of the line search).
        ls: Armijo line search on ||g||^2 over the batch (at most 4 halvings or so per step).
        name: label of the solve, handed back in the result.

    Returns:
        The dict that the module's docstring describes, and ``name``.

    Raises:
        InputError: as for :func:`anderson`.
    """
    run = Run(f, x0, threshold, eps, stop_mode, 1 if ls else check_every, floor)
    inverse = _BroydenInverse(run.x0, threshold)
    x, _, _ = run.evaluate(run.x0, out=inverse.residual)
    length = None
    for _ in range(threshold):
        if run.stopped:
            break
        direction = inverse.newton_direction(length)
        if ls:
            x, gx, length = _line_search(run, x, direction)
            inverse.residual.copy_(gx)
        else:
            x, _, _ = run.evaluate(x + direction, out=inverse.residual)
            length = 1.0
    return {**run.result(), "name": name}


class _BroydenInverse:
    r"""Broyden's inverse estimate H as a product of rank-one factors in the directions alone.

    With d_j = -H_j g_j and steps s_j = t_j d_j, Sherman-Morrison gives

        H_{j+1} = (I + w_j d_j' / d_j'd_j) H_j,   w_j = d_{j+1} - (1 - t_j) d_j

    (unit steps: Kelley, Iterative Methods for Linear and Nonlinear Equations, section 7.3). So one
    vector per update is stored instead of two. Applying k factors to -g gives p + sum c_j w_j with
    c_j = d_j'p_j / d_j'd_j, a triangular system in the products d_i'd_j and d_i'g:

        d_j'd_j c_j - sum_{i<j} c_i (d_j'd_{i+1} - (1 - t_i) d_j'd_i) = -d_j'g

    It is solved in float64 from direct inner products: a recurrence for them would save reading
    the directions once, but lose the small residuals.

    ``residual`` (B, D) is where the caller writes g at the newest point.
    """

    def __init__(self, like: Tensor, capacity: int):
        batch, size = like.shape
        self._newest = like.new_empty(2, batch, size)
        self.direction, self.residual = self._newest
        self.capacity = capacity  # directions at most
        self.blocks: list[Tensor] = []  # (rows, B, D), filled in order
        self.count = self._free = 0  # directions stored; rows left in the last block
        self.short: list[float] = []  # 1 - t_j
        self.triangle = torch.zeros(batch, 16, 16, dtype=torch.float64, device=like.device)

    def newton_direction(self, length: float | None) -> Tensor:
        """-H g, (B, D), overwritten by the next call.

        Args:
            length: t of the step along the last direction, which ended where g is; None at first.
        """
        if length is None:
            return self.direction.copy_(self.residual)  # H = -I
        self._store(length)
        coefficients = self._coefficients()  # (B, k); the last, sigma, is of the unknown w_k
        denominator = 1 + coefficients[:, -1:]
        # A vanishing denominator has no update: take the plain step g.
        usable = denominator.abs() > torch.finfo(torch.float64).eps
        scale = torch.where(usable, denominator.reciprocal(), 0.0)
        weights = F.pad(-scale * coefficients[:, :-1], (1, 0))
        if any(self.short):
            weights += scale * self._like(self.short, coefficients) * coefficients
        scale = torch.where(usable, scale, 1.0)

        torch.mul(self.residual, scale.to(self.residual.dtype), out=self.direction)
        self._add_directions(weights.to(self.residual.dtype))
        return self.direction

    def _store(self, length: float) -> None:
        """Keep the newest direction, along which a step of that length was taken."""
        if self._free == 0:
            _, batch, size = self._newest.shape
            fitting = _BLOCK_BYTES // (self.direction.nbytes or 1)
            self._free = min(max(_BLOCK_ROWS, fitting), self.capacity - self.count)
            self.blocks.append(self._newest.new_empty(self._free, batch, size))
        self.blocks[-1][-self._free] = self.direction
        self._free -= 1
        self.count += 1
        self.short.append(1 - length)

    def _coefficients(self) -> Tensor:
        """c of the class's docstring, (B, k) in float64, after extending the triangle."""
        k = self.count - 1
        if k == self.triangle.shape[1]:
            self.triangle = F.pad(self.triangle, (0, k, 0, k))
        parts = [_products(self._newest, rows) for rows in self._filled()]
        products = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # (B, 2, k + 1)
        own, right = products[:, 0], products[:, 1].neg()
        row = self.triangle[:, k, : k + 1]
        torch.neg(own[:, 1:], out=row[:, :-1])
        if any(self.short):
            row[:, :-1] += self._like(self.short[:-1], own) * own[:, :-1]
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
        yield self.blocks[-1][: len(self.blocks[-1]) - self._free]

    @staticmethod
    def _like(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)


def _line_search(run: Run, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, float]:
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
