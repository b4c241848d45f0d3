"""Newton's method with GMRES for its linear systems."""

from functools import cache

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lib.errors import check, check_count, is_number
from lib.solvers.arguments import check_damping
from lib.solvers.krylov import gmres_cycle, multiply
from lib.solvers.maps import Map, plain, vjp
from lib.solvers.norms import mask_of, norms, to_device
from lib.solvers.precision import callers_products
from lib.solvers.sample_solve import start
from lib.solvers.solve import Solve, solver_method
from lib.solvers.transforms import tangent_of

PATIENCE, TRIALS = 5, 5  # steps in a row without a lower residual; then shorter steps


@solver_method
def newton_krylov(
    f: Map,
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    inner: int = 20,
    inner_eps: float = 0.1,
    damping: float = 1.0,
    warmup: int = 1,
    jvp: str = "reverse",
    **control,
) -> dict:
    """Inexact Newton: z+ = z + t d with (I - J(z)) d = f(z) - z by GMRES (Knoll and Keyes 2004).

    Products J v are exact: they come from differentiating the vector-Jacobian product u -> J'u,
    which is linear in u, or from forward-mode differentiation. f is differentiated at every
    iterate, so all its operations must be differentiable; if f offers ``f.plain``, that map is
    used. The solve leaves ``torch.inference_mode``. If f holds tensors made in that mode, only
    forward-mode differentiation gives the products.

    Each sample has its own step length t, at first ``damping``. If five steps in a row do not lower
    its residual, the sample goes back to its lowest point and shortens the step from there.

    Args:
        f, x0, eps, stop_mode: as for :func:`~lib.solvers.anderson.anderson`.
        threshold: maximum number of evaluations of f and products with J together.
        inner: maximum number of products per linear system, which may use up the threshold.
        inner_eps: relative residual ||g - (I - J) d|| / ||g|| at which a sample's linear system
            counts as solved. Near the solution each step lowers the residual by this factor.
        damping: step length t, in (0, 1], unless a shorter one is needed.
        warmup: number of plain iterations before the first Newton step. A sample keeps those that
            lower its residual. At z = 0 the derivative of layer normalisation is 1/sqrt(its eps):
            a Newton step from there hardly moves.
        jvp: 'reverse' keeps one graph per iterate and needs second derivatives; 'forward'
            evaluates f again for each product and needs forward-mode derivatives.
        **control: see :class:`~lib.solvers.arguments.Control`.

    Returns:
        The dict that :mod:`lib.solvers` describes. The traces cover all evaluated points, including
        those of shortened steps.

    Raises:
        InputError: as for :func:`~lib.solvers.anderson.anderson`.
    """
    check_count("inner", inner)
    check_damping(damping)
    check_count("warmup", warmup, least=0)
    fits = is_number(inner_eps) and 0 < inner_eps < 1
    check(fits, "inner_eps", inner_eps, "a number between 0 and 1")
    check(jvp in _PRODUCTS, "jvp", jvp, "'reverse' or 'forward'")
    # Outside of inference mode, so that enable_grad works; gradients stay off by default.
    with torch.inference_mode(False), torch.no_grad():
        if x0.is_inference():
            x0 = x0.clone()
        linearised = _Linearised(f, jvp)
        solve = start(linearised, x0, threshold, eps, stop_mode, control, needs_all=True)
        iterate = _Iterate(solve, warmup, damping)
        while not solve.stopped:
            newton = iterate.takes_a_step
            if not solve.affords(1 + bool(newton.any())):  # an evaluation, and perhaps a product
                break
            if newton.any():
                goal = inner_eps * iterate.size
                size = min(inner, solve.left - 1, iterate.x.shape[1])
                residual = torch.where(mask_of(newton, iterate.gx), iterate.gx, 0.0)
                step, improved = gmres_cycle(_Step(solve, linearised, goal), residual, size)
                if solve.resting.all():
                    break
                # Without improvement J has the eigenvalue 1: take a plain step.
                iterate.step = torch.where(mask_of(improved, step), step, iterate.gx)
            iterate.evaluate()
        return solve.result()


class _Iterate:
    """The current point of each sample, and its next one. Arrays (B,) are per sample, on the host.

    A sample first takes plain steps, then full Newton steps. It remembers its lowest point (that
    with its lowest residual) and the step from there. After a plain step in vain it goes back to
    its lowest point; after ``PATIENCE`` Newton steps in vain it also shortens the step from there.
    It does not go back earlier, because the residual of Newton's method often rises before it falls
    (the watchdog of Chamberlain et al. 1982).
    """

    def __init__(self, solve: Solve, warmup: int, damping: float):
        self._solve, self._damping = solve, damping
        self._set(*solve.evaluate(solve.x0))
        batch = len(self.x)
        # ``step`` (B, D) is the next Newton step; samples that take none ignore theirs.
        self._low_x, self._low_step, self.step = self.x, self.gx, self.gx
        self._low, self._after = np.full((2, batch), np.inf)  # residual at _low_x; one step later
        self._fresh = np.ones(batch, dtype=bool)  # take the current point as the lowest
        self._plain = np.full(batch, warmup)  # plain steps left
        self._returns = np.zeros(batch, dtype=bool)
        self._vain, self._tries = np.zeros((2, batch), dtype=np.int64)  # vain steps; shorter ones
        self._lengths = np.full(batch, float(damping))

    def _set(self, x: Tensor, fx: Tensor, gx: Tensor) -> None:
        self.x, self.fx, self.gx, self.size = x, fx, gx, norms(gx)

    @property
    def takes_a_step(self) -> np.ndarray:
        """The samples whose next step is a Newton step."""
        return ~(self._solve.resting | self._returns | (self._plain > 0))

    def evaluate(self) -> None:
        """Evaluate f at the next points."""
        newton, plain, returns = self.takes_a_step, self._plain > 0, self._returns.copy()
        lower = ~returns & (self._fresh | (self.size < self._low))
        if lower.any():
            mask = mask_of(lower, self.x)
            self._low_x = torch.where(mask, self.x, self._low_x)
            self._low_step = torch.where(mask, self.step, self._low_step)
            self._low, self._vain = (
                np.where(lower, new, old) for new, old in ((self.size, self._low), (0, self._vain))
            )
            self._fresh &= ~lower
        point = self.x + self._damping * self.step
        if plain.any():
            point = torch.where(mask_of(plain, point), self.fx, point)
        if returns.any():
            lengths = to_device(self._lengths[:, None], point)
            point = torch.where(
                mask_of(returns, point), self._low_x + lengths * self._low_step, point
            )
        self._set(*self._solve.evaluate(point))

        self._vain += newton
        self._after = np.where(newton & (self._vain == 1), self.size, self._after)
        self._plain -= plain
        self._come_back(returns)
        self._send_back(plain & (self.size > self._low), 0.0)
        self._plain[self._returns] = 0
        strays = newton & (self._vain >= PATIENCE) & ~(self.size < self._low)
        if strays.any():
            full = np.full_like(self._lengths, self._damping)
            self._send_back(strays, self._shorter(self._after, full))

    def _send_back(self, samples: np.ndarray, lengths: np.ndarray | float) -> None:
        self._returns |= samples
        self._lengths = np.where(samples, lengths, self._lengths)
        self._tries = np.where(samples, 0, self._tries)

    def _come_back(self, returns: np.ndarray) -> None:
        """Release the samples that are low enough, or have used up their trials."""
        if not returns.any():
            return
        there = self._lengths == 0
        fits = there | (self.size <= (1 - 1e-4 * self._lengths) * self._low)
        self._tries += returns
        ends = returns & (fits | (self._tries >= TRIALS))
        self._fresh |= ends & (there | ~fits)
        self._returns = returns & ~ends
        shorter = self._shorter(self.size, self._lengths)
        self._lengths = np.where(self._returns, shorter, self._lengths)

    def _shorter(self, size: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The minimum of the parabola through the squared residuals at 0 and at ``lengths``.

        Its slope at 0 is that of a Newton step. The minimum is kept within 0.1 to 0.5 ``lengths``.
        """
        with np.errstate(over="ignore"):
            share = (size / np.maximum(self._low, 1e-300)) ** 2
        least = lengths**2 / np.maximum(share - 1 + 2 * lengths, 1e-300)
        return np.clip(least, 0.1 * lengths, 0.5 * lengths)


class _Step:
    """The linear system of one Newton step, for :func:`~lib.solvers.krylov.gmres_cycle`.

    Each sample ends by its own residual, whatever ``stop`` says: its step depends on no other.
    """

    def __init__(self, solve: Solve, linearised: "_Linearised", goal: np.ndarray):
        self.solve, self._linearised, self._goal = solve, linearised, goal

    def product(self, v: Tensor) -> Tensor:
        return multiply(self.solve, self._linearised.product, v)

    def enough(self, residual: np.ndarray, size: np.ndarray) -> np.ndarray:
        return residual <= self._goal


class _Linearised:
    """f; after each evaluation ``product`` multiplies with the Jacobian at that point."""

    def __init__(self, f: Map, jvp: str):
        self._f, self._jvp = plain(f), jvp
        self.product: Map = torch.zeros_like

    def __call__(self, z: Tensor) -> Tensor:
        self.product = torch.zeros_like  # free the graph before f builds the next one
        try:
            value, self.product = _PRODUCTS[self._jvp](self._f, z)
        except RuntimeError as error:
            if self._jvp == "forward" or "nference tensor" not in str(error):
                raise
            self._jvp = "forward"  # autograd does not record operations on inference tensors
            value, self.product = _forward(self._f, z)
        return value


def _reverse(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """f(z), and v -> J v as the derivative of u -> J'u, which is linear in u."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = f(point)
    fits = isinstance(value, Tensor) and value.shape == z.shape  # if not, the solve refuses it
    if not fits or not value.requires_grad:  # without requires_grad f does not depend on z
        return value, torch.zeros_like

    @cache
    def linear() -> tuple[Tensor, Tensor]:
        """u, and J'u with its graph. Made once, at the first product."""
        u = torch.zeros_like(value, requires_grad=True)
        with callers_products():
            return u, vjp(value, point, u, create_graph=True)

    def product(v: Tensor) -> Tensor:
        u, back = linear()
        if not back.requires_grad:  # J = 0, as for a step function
            return torch.zeros_like(v)
        with callers_products():
            return vjp(back, u, v)

    return value.detach(), product


def _forward(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """f(z), and v -> J v by forward-mode differentiation."""

    def product(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = tangent_of(f(forward_ad.make_dual(z, v)))
        return torch.zeros_like(v) if tangent is None else tangent

    return f(z), product


_PRODUCTS = {"reverse": _reverse, "forward": _forward}
