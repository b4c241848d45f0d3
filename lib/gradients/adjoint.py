"""The linear equations behind the gradient and the forward-mode tangent of an equilibrium.

With J = df/dz at z*, the adjoint y solves y = J'y + g for g = dL/dz. The tangent t of z*, for a
change dx of x, solves t = J t + J_x dx. The backward solver solves both.
"""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.distributed import ProcessGroup

from lib.errors import DEQWarning
from lib.solvers.arguments import unwrapped
from lib.solvers.maps import Affine, Map, lockstep, plain, vjp
from lib.solvers.norms import norms as norms_of
from lib.solvers.norms import to_device, totals
from lib.solvers.precision import in_float32, same_autocast, solve_in_stages
from lib.solvers.stats import all_finite
from lib.solvers.transforms import tangent_of

# A solution whose residual ||A y + b - y|| / ||b|| is above this is compared with y = b. If the
# better of the two is still above this, a warning follows. With a nearly singular I - A, a solution
# with residual 0.14 had an error larger than its own norm (scripts/benchmarks/bench_adjoints.py).
POOR = 0.1

_RISING = 6  # a residual that rises over so many last evaluations shows divergence
_MOST_SCALE = 120  # largest exponent of a scale 2^k: within the range of float32, with room


def warn(message: str) -> None:
    warnings.warn(message, DEQWarning, stacklevel=5)


class LinearSolve:
    """Solve y = A y + b, and judge the solution by ||A y + b - y|| / ||b|| per sample.

    A solver judges y by ||f(y) - y|| / ||f(y)||, which is small for an exploding y, or by
    ||f(y) - y|| alone, which is small for y = 0 if b is small. Therefore:

    - b is scaled by a power of two, which is exact. This happens where the norm of b is out of the
      range whose squares float32 holds. In stop mode 'abs' it also happens where the norm is below
      1/2, so an absolute tolerance means eps times min(1, ||b||). The norm is that of the whole
      batch, or of each sample if the solver stops per sample.
    - A sample takes y = b if its residual is above :data:`POOR` and that of y = b is smaller; if
      its solution is y = 0; or if its products are not finite.
    - A warning follows if a residual is still large.

    Args:
        solver: a solver of :mod:`lib.solvers`, or a user-defined one.
        threshold, stop_mode: arguments for the solver.
        report: called with the solver's dict after each solve.
        name: what warnings call the solution.
        of: what warnings call the result that depends on the solution.
        group: processes among which products communicate (:func:`~lib.solvers.maps.lockstep`).
    """

    def __init__(
        self,
        solver: Callable[..., dict],
        threshold: int,
        stop_mode: str,
        report: Callable[[dict], None],
        name: str = "adjoint",
        of: str = "gradient",
        group: ProcessGroup | None = None,
    ):
        self._solver, self._threshold, self._stop_mode = solver, threshold, stop_mode
        self._report, self._name, self._of, self._group = report, name, of, group

    @torch.no_grad()
    def __call__(
        self,
        product: Map,
        b: Tensor,
        *,
        start: Tensor | None = None,
        threshold: int | None = None,
        make_precise: Callable[[], Map] | None = None,
    ) -> Tensor:
        """Solve for y, with the shape and dtype of b (B, ...).

        Args:
            product: v -> A v, for each sample separately.
            start: initial guess; None is y = 0.
            threshold: replaces the default threshold of this object.
            make_precise: returns the product in float32, if ``product`` is in half precision.
        """
        options = {
            "threshold": self._threshold if threshold is None else threshold,
            "stop_mode": self._stop_mode,
        }
        if b.is_meta:  # no values to judge
            y0 = torch.zeros_like(b) if start is None else start
            return self._solver(Affine(product, b), y0, **options)["result"]
        with lockstep(product, b, self._group) as product:
            return self._in_step(product, b, start, make_precise, options)

    def _in_step(
        self, product: Map, b: Tensor, start: Tensor | None, make_precise, options: dict
    ) -> Tensor:
        norms = sample_norms(b)
        scale = self._scale(norms)
        scaled = _times(b, scale)
        y0 = torch.zeros_like(b) if start is None else _times(start, scale)
        step = Affine(product, scaled, y0 if start is None else None)  # A 0 = 0
        if make_precise is None:
            solution = self._solver(step, y0, **options)
        else:
            solution = solve_in_stages(
                self._solver, step, lambda: Affine(make_precise(), scaled), y0, **options
            )
        solution = _unscaled(solution, scale)
        self._report(solution)
        return self._judged(solution, product, b, norms)

    def _scale(self, norms: np.ndarray) -> np.ndarray:
        """The powers of two (B,) that scale b: all the same unless the solver stops per sample."""
        finite = np.where(np.isfinite(norms), norms, 0.0)
        alone = unwrapped(self._solver)[1].get("stop") == "sample"
        sizes = finite if alone else np.full_like(finite, math.hypot(*finite))
        least = 0.5 if self._stop_mode == "abs" else 2.0**-40
        fits = (sizes == 0) | ((least <= sizes) & (sizes <= 2.0**40)) | ~np.isfinite(sizes)
        return np.exp2(np.where(fits, 0, np.minimum(-np.frexp(sizes)[1], _MOST_SCALE)))

    def _judged(self, solution: dict, product: Map, b: Tensor, norms: np.ndarray) -> Tensor:
        """Per sample: the solver's y if it is good, else the better of y and b."""
        y = solution["result"]
        lost = np.zeros(len(b), dtype=bool)
        if not all_finite(solution):
            lost = ~solution["finite"].cpu().numpy()
            warn(
                f"the {self._name} of some samples is not finite: they pass their "
                f"{self._of} unsolved"
            )
        if "norms" in solution:
            residual = _relative(solution["norms"][0], norms)
        else:  # a user-defined solver that does not report norms
            residual = _relative(sample_norms(product(y) + b - y), norms)
        poor = lost | ~(residual <= POOR)  # negated `<=`, so NaN counts as poor
        if poor.any():
            simple = _relative(sample_norms(product(b)), norms)
            none = (sample_norms(y) == 0) & (norms > 0)
            passes = poor & (lost | none | ~(residual <= simple))
            if passes.any():
                rows = to_device(passes, b.device).view(-1, *[1] * (b.dim() - 1))
                y = torch.where(rows, b, y)
                residual = np.where(passes, simple, residual)
        left = residual[~(residual <= POOR) & ~lost]
        if left.size:  # one digit: Python shows equal warning texts once
            what = f"relative residual up to {left.max():.1g}"
        elif _rises(solution):  # the iteration diverged after its best point
            what = "its residual rose to the end"
        else:
            return y
        warn(
            f"the {self._name} is not solved ({what}), so the {self._of} may be far off: raise "
            "b_thres, take another b_solver (gmres), or regularise the Jacobian"
        )
        return y


def _rises(solution: dict) -> bool:
    """Whether the residual rose to the threshold: that of the best point says little then."""
    last = solution.get("abs_trace", [])[-_RISING:]
    grows = all(a < b for a, b in pairwise(last))
    return solution.get("reason") == "threshold" and len(last) == _RISING and grows


def sample_norms(vectors: Tensor) -> np.ndarray:
    """Norms (B,) of vectors (B, ...), on the host in float64."""
    return norms_of(vectors.reshape(len(vectors), -1))


def _powers_of_two(vectors: Tensor) -> Tensor:
    """For each vector (B, ...): the power of two above its norm, or 1 for zero; (B, 1, ...)."""
    exponents = np.clip(np.frexp(sample_norms(vectors))[1], -_MOST_SCALE, _MOST_SCALE)
    return to_device(np.exp2(exponents), vectors).view(-1, *[1] * (vectors.dim() - 1))


def _relative(residual: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """residual / norms; where b = 0, the residual itself, which is 0 for the solution y = 0."""
    return np.where(norms > 0, residual / np.where(norms > 0, norms, 1.0), residual)


def _times(vectors: Tensor, factors: np.ndarray) -> Tensor:
    """Vectors (B, ...) times factors (B,); the same tensor if all factors are 1."""
    if (factors == 1).all():
        return vectors
    return vectors * to_device(factors, vectors).view(-1, *[1] * (vectors.dim() - 1))


def _unscaled(solution: dict, scale: np.ndarray) -> dict:
    """Convert the solver's dict from the scaled equation (b times ``scale`` (B,)) to the original.

    If the samples have different scales, ``abs_trace`` and ``eps`` stay those of the scaled
    equation.
    """
    if (scale == 1).all():
        return solution
    out = dict(solution)
    out["result"] = _times(solution["result"], 1 / scale)
    absolute = solution.get("stop_mode") == "abs"
    for name in ["norms", "residual"] if absolute else ["norms"]:
        if name in solution:
            value = solution[name]
            of_host = isinstance(value, np.ndarray)
            out[name] = value / scale if of_host else _times(value, 1 / scale)
    if (scale != scale[0]).any():
        if "norms" in out:
            lowest = dict(zip(("abs", "rel"), totals(out["norms"]), strict=True))
            out |= {"abs_lowest": lowest["abs"], "rel_lowest": lowest["rel"]}
            out["lowest"] = lowest[solution["stop_mode"]]
        return out
    for name in ["abs_lowest", "lowest", "eps"] if absolute else ["abs_lowest"]:
        if name in solution:
            out[name] = solution[name] / scale[0]
    if "abs_trace" in solution:
        out["abs_trace"] = [value / scale[0] for value in solution["abs_trace"]]
    return out


class Adjoint:
    """Products with J' at a point, and solves with I - J'.

    Args:
        fz: f(point), with its graph.
        point: z*, which requires grad.
        solve: the linear solve.
        again: f, if ``fz`` was computed in half precision. The solve can then finish in float32,
            provided that f(point) still gives ``fz``.
        watch: called with the product and the right-hand side after each solve.
    """

    def __init__(
        self,
        fz: Tensor,
        point: Tensor,
        solve: LinearSolve,
        again: Map | None = None,
        watch: Callable[[Map, Tensor], None] | None = None,
    ):
        self.fz, self.point = fz, point
        self._solve, self._again, self._watch = solve, again, watch
        self._autocast = same_autocast(point.device)

    def product(self, v: Tensor) -> Tensor:
        """J'v, with the shape and dtype of v."""
        return vjp(self.fz, self.point, v)

    def solve(
        self, grad: Tensor, start: Tensor | None = None, threshold: int | None = None
    ) -> Tensor:
        """Solve y = J'y + grad; ``start`` and ``threshold`` as for :class:`LinearSolve`."""
        again = self._again
        make_precise = None if again is None else lambda: self._in_float32(again)
        y = self._solve(
            self.product, grad, start=start, threshold=threshold, make_precise=make_precise
        )
        if self._watch is not None:
            self._watch(self.product, grad)
        return y

    def solve_transposed(self, v: Tensor) -> Tensor:
        """Solve t = J t + v. The products J t are derivatives of the linear map u -> J'u."""
        with torch.enable_grad():
            u = torch.zeros_like(self.fz, requires_grad=True)
            (back,) = torch.autograd.grad(
                self.fz, self.point, u, create_graph=True, allow_unused=True
            )
        if back is None or not back.requires_grad:  # f does not depend on z
            return v
        return self._solve(lambda t: vjp(back, u, t), v)

    def _in_float32(self, again: Map) -> Map:
        with torch.no_grad(), self._autocast():
            same = torch.equal(again(self.point.detach()), self.fz)
        if not same:  # a tensor that f refers to has changed since, or f is random
            return self.product
        with torch.enable_grad():
            point = self.point.detach().requires_grad_()
            fz = in_float32(again)(point)
        return lambda v: vjp(fz, point, v)


class Tangents:
    """Products with J at a point, and solves with I - J, by forward-mode differentiation of f.

    Args:
        f: the layer. The call is inside a dual level in which the inputs of f have tangents.
        point: z*, without a tangent.
        shift: J_x dx, the tangent of f(point).
        solve: the linear solve.
    """

    def __init__(self, f: Map, point: Tensor, shift: Tensor, solve: LinearSolve):
        self._f, self._point, self._solve = plain(f), point.detach(), solve
        self.shift = shift.detach()
        self._powers = _powers_of_two(self.shift)

    def product(self, v: Tensor) -> Tensor:
        """J v, with the shape and dtype of v.

        Forward mode through f gives J v + J_x dx, from which J_x dx is subtracted. v is scaled to
        about the norm of J_x dx, so that the difference keeps its digits.
        """
        scale = self._powers / _powers_of_two(v)
        at = forward_ad.make_dual(self._point, (scale * v).to(self._point.dtype))
        found = tangent_of(self._f(at))
        return torch.zeros_like(v) if found is None else ((found - self.shift) / scale).to(v.dtype)

    def solve(self, b: Tensor) -> Tensor:
        """Solve t = J t + b."""
        return self._solve(self.product, b)
