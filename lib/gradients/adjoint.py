"""The linear equations behind the gradient and the forward-mode tangent of an equilibrium.

With J = df/dz at z*, the adjoint y solves y = J'y + g for g = dL/dz. The tangent t of z*, for a
change dx of x, solves t = J t + J_x dx. The backward solver solves both.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed
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

# The largest residual ||A y + b - y|| / ||b|| of a good solution. With a nearly singular I - A, one
# of residual 0.14 had an error larger than its own norm (scripts/benchmarks/bench_adjoints.py).
POOR = 0.1

_RISING = 6  # a residual that rises over so many last evaluations shows divergence
_MOST_SCALE = 120  # largest exponent of a scale 2^k: within the range of float32, with room

EVERY, PRODUCTS = 100, 20  # of RadiusWatch: 20 products per 100 backward passes, 0.2 per step


def warn(message: str) -> None:
    warnings.warn(message, DEQWarning, stacklevel=5)


@dataclass(frozen=True)
class LinearSolve:
    """Solve y = A y + b, and judge the solution by ||A y + b - y|| / ||b|| per sample.

    A solver judges y by ||f(y) - y|| / ||f(y)||, which is small for an exploding y, or by
    ||f(y) - y|| alone, which is small for y = 0 if b is small. Therefore:

    - b is scaled by a power of two, which is exact, where its norm is out of the range whose
      squares float32 holds. In stop mode 'abs' also where the norm is below 1/2: an absolute
      tolerance means eps times min(1, ||b||). The norm is of the whole batch, or of each sample if
      the solver stops per sample.
    - A sample takes y = b if its residual is above :data:`POOR` and that of y = b is smaller; if
      its solution is y = 0; or if its products are not finite.
    - A warning follows if a residual is still above :data:`POOR`.

    Args:
        solver: a solver of :mod:`lib.solvers`, or a user-defined one.
        threshold, stop_mode: arguments for the solver.
        report: called with the solver's dict after each solve.
        name, of: what warnings call the solution, and the result that depends on it.
        group: processes among which products communicate (:func:`~lib.solvers.maps.lockstep`).
    """

    solver: Callable[..., dict]
    threshold: int
    stop_mode: str
    report: Callable[[dict], None]
    name: str = "adjoint"
    of: str = "gradient"
    group: ProcessGroup | None = None

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
            threshold: replaces that of this object.
            make_precise: returns the product in float32, if ``product`` is in half precision.
        """
        options = {
            "threshold": self.threshold if threshold is None else threshold,
            "stop_mode": self.stop_mode,
        }
        y0 = torch.zeros_like(b) if start is None else start
        if b.is_meta:  # no values to judge
            return self.solver(Affine(product, b), y0, **options)["result"]
        with lockstep(product, b, self.group) as product:
            norms = sample_norms(b)
            scale = self._scale(norms)
            scaled, y0 = _times(b, scale), _times(y0, scale)
            step = Affine(product, scaled, y0 if start is None else None)  # A 0 = 0
            if make_precise is None:
                solution = self.solver(step, y0, **options)
            else:
                solution = solve_in_stages(
                    self.solver, step, lambda: Affine(make_precise(), scaled), y0, **options
                )
            solution = _unscaled(solution, scale)
            self.report(solution)
            return self._judged(solution, product, b, norms)

    def _scale(self, norms: np.ndarray) -> np.ndarray:
        """The powers of two (B,) that scale b."""
        finite = np.where(np.isfinite(norms), norms, 0.0)
        alone = unwrapped(self.solver)[1].get("stop") == "sample"
        sizes = finite if alone else np.full_like(finite, math.hypot(*finite))
        least = 0.5 if self.stop_mode == "abs" else 2.0**-40
        fits = (sizes == 0) | ((least <= sizes) & (sizes <= 2.0**40)) | ~np.isfinite(sizes)
        return np.exp2(np.where(fits, 0, np.minimum(-np.frexp(sizes)[1], _MOST_SCALE)))

    def _judged(self, solution: dict, product: Map, b: Tensor, norms: np.ndarray) -> Tensor:
        """Per sample: the solver's y if it is good, else the better of y and b."""
        y = solution["result"]
        lost = np.zeros(len(b), dtype=bool)
        if not all_finite(solution):
            lost = ~solution["finite"].cpu().numpy()
            warn(
                f"the {self.name} of some samples is not finite: they pass their {self.of} unsolved"
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
                y = torch.where(_column(to_device(passes, b.device), b), b, y)
                residual = np.where(passes, simple, residual)
        last = solution.get("abs_trace", [])[-_RISING:]
        rises = len(last) == _RISING and all(a < b for a, b in pairwise(last))
        left = residual[~(residual <= POOR) & ~lost]
        if left.size:  # one digit: Python shows equal warning texts once
            what = f"relative residual up to {left.max():.1g}"
        elif rises and solution.get("reason") == "threshold":  # the best point says little then
            what = "its residual rose to the end"
        else:
            return y
        warn(
            f"the {self.name} is not solved ({what}), so the {self.of} may be far off: raise "
            "b_thres, take another b_solver (gmres), or regularise the Jacobian"
        )
        return y


def sample_norms(vectors: Tensor) -> np.ndarray:
    """Norms (B,) of vectors (B, ...), on the host in float64."""
    return norms_of(vectors.reshape(len(vectors), -1))


def _column(numbers: Tensor, vectors: Tensor) -> Tensor:
    """Numbers (B,) as (B, 1, ...), of the rank of ``vectors``."""
    return numbers.view(-1, *[1] * (vectors.dim() - 1))


def _powers_of_two(vectors: Tensor) -> Tensor:
    """The power of two above the norm of each vector, or 1 for zero; (B, 1, ...)."""
    exponents = np.clip(np.frexp(sample_norms(vectors))[1], -_MOST_SCALE, _MOST_SCALE)
    return _column(to_device(np.exp2(exponents), vectors), vectors)


def _relative(residual: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """residual / norms; where b = 0, the residual itself, which is 0 for the solution y = 0."""
    return np.where(norms > 0, residual / np.where(norms > 0, norms, 1.0), residual)


def _times(vectors: Tensor, factors: np.ndarray) -> Tensor:
    """Vectors (B, ...) times factors (B,); the same tensor if all factors are 1."""
    if (factors == 1).all():
        return vectors
    return vectors * _column(to_device(factors, vectors), vectors)


def _unscaled(solution: dict, scale: np.ndarray) -> dict:
    """The solver's dict of the scaled equation (b times ``scale``, (B,)), for the original one.

    With different scales, ``abs_trace`` and ``eps`` stay those of the scaled equation.
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
            g, relative = totals(out["norms"])
            lowest = g if absolute else relative
            out |= {"abs_lowest": g, "rel_lowest": relative, "lowest": lowest}
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
        again: f, if ``fz`` was computed in half precision: the solve can then finish in float32.
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
        """Solve t = J t + v; the products J t are derivatives of u -> J'u."""
        with torch.enable_grad():
            u = torch.zeros_like(self.fz, requires_grad=True)
            back = vjp(self.fz, self.point, u, create_graph=True)
        if not back.requires_grad:  # f does not depend on z
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
        f: the layer, inside a dual level in which its inputs have tangents.
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

        Forward mode gives J v + J_x dx, and J_x dx is subtracted; v is scaled to about the norm of
        J_x dx, so that the difference keeps its digits.
        """
        scale = self._powers / _powers_of_two(v)
        at = forward_ad.make_dual(self._point, (scale * v).to(self._point.dtype))
        found = tangent_of(self._f(at))
        return torch.zeros_like(v) if found is None else ((found - self.shift) / scale).to(v.dtype)

    def solve(self, b: Tensor) -> Tensor:
        """Solve t = J t + b."""
        return self._solve(self.product, b)


class RadiusWatch:
    """Warns once if the spectral radius of J = df/dz at z* exceeds one in training.

    At every 100th backward pass, 20 products with J' start from the incoming gradient. The growth
    of the last 10 estimates the spectral radius per sample, without random numbers. It never
    exceeds ||J||_2, so a contraction stays silent. It is rough if many eigenvalues have nearly the
    largest modulus, or if J is far from normal (see :func:`lib.jacobian.power_method`).

    Several processes that train together get no estimate: their backward passes may communicate,
    and the estimate would have to run in all of them alike.
    """

    def __init__(self):
        self.passes, self.said = 0, False

    def __call__(self, product: Map, grad: Tensor) -> None:
        """Count a backward pass: v -> J'v, and the incoming gradient."""
        self.passes += 1
        if self.said or self.passes % EVERY or grad.is_meta or _several_processes():
            return
        radius = growth(product, grad)
        if radius > 1:
            self.said = True
            warn(
                f"the spectral radius of df/dz has passed one: it is about {radius:.2f} (the "
                f"largest of a batch, at backward pass {self.passes}). Plain iteration then leaves "
                "the fixed point, and solves may stop early: bound the weights "
                "(lib.spectral_norm) or train with the Jacobian loss (jac_vecs); this is said once"
            )


@torch.no_grad()
def growth(product: Map, start: Tensor) -> float:
    """The growth per product over their last half, from ``start`` (B, ...): the largest of a batch,
    as a few unstable samples can stop a solve early. 0 for a start of zero; NaN if a product is not
    finite."""
    dtype = torch.promote_types(start.dtype, torch.float32)
    smallest = torch.finfo(dtype).tiny

    def norms(vectors: Tensor) -> Tensor:
        return torch.linalg.vector_norm(vectors.flatten(1).to(dtype), dim=1)

    norm = norms(start)
    v, logs = start, torch.zeros_like(norm)
    for i in range(PRODUCTS):
        v = product((v / _column(norm.clamp(min=smallest), v)).to(start.dtype))
        norm = norms(v)
        if i >= PRODUCTS // 2:
            logs += norm.clamp(min=smallest).log()
    return (logs / (PRODUCTS - PRODUCTS // 2)).exp().amax().item()


def _several_processes() -> bool:
    found = torch.distributed
    return found.is_available() and found.is_initialized() and found.get_world_size() > 1
