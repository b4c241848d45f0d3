"""Newton's method with GMRES for its linear systems."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lib.host import to_device
from lib.krylov import gmres_cycle, multiply, rows
from lib.maps import Map, plain
from lib.matmul_precision import callers_products
from lib.norms import norms
from lib.sample_run import start
from lib.solver_run import Run, check, check_count, check_damping, is_number, solver_method

PATIENCE, TRIALS = 5, 5  # steps in a row that do not lower a residual; lengths tried after that


@solver_method
def newton_krylov(
    f: Callable[[Tensor], Tensor],
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

    J is never formed. Products J v are exact: by differentiating the vector-Jacobian product
    u -> J'u, which is linear in u, or by forward-mode differentiation. f is differentiated at
    every iterate, so it must be made of operations that can be; ``f.plain`` is used where f
    offers it. Under ``torch.inference_mode`` the solve leaves it; a map that holds tensors made
    there has products by forward-mode differentiation alone.

    The length t is each sample's own: ``damping``, but where five steps in a row did not lower its
    residual it goes back to the lowest point and shortens the step from there.

    Args:
        f, x0, eps, stop_mode: as for :func:`~lib.anderson.anderson`.
        threshold: evaluations of f and products with J at most, together.
        inner: products per system at most; fewer where the threshold is not to go to one system.
        inner_eps: relative residual ||g - (I - J) d|| / ||g|| at which a sample's system counts as
            solved: by that factor each step lowers the residual, once near the solution.
        damping: length t of a step, in (0, 1], where it need not be shorter.
        warmup: plain iterations before the first step, kept by the samples whose residual they
            lower. At z = 0 layer normalisation has a derivative of 1/sqrt(its eps): a Newton step
            from there leads nearly nowhere.
        jvp: 'reverse' keeps one graph per iterate, and needs second derivatives; 'forward'
            evaluates f anew for each product, and needs forward-mode derivatives.
        **control: see :class:`~lib.solver_run.Control`.

    Returns:
        The dict that :mod:`lib.solvers` describes; the traces are of all evaluated points, those
        of shortened steps included.

    Raises:
        InputError: as for :func:`~lib.anderson.anderson`.
    """
    check(callable(f), "f", f, "a function of the state")
    check_count("inner", inner)
    check_damping(damping)
    check_count("warmup", warmup, least=0)
    fits = is_number(inner_eps) and 0 < inner_eps < 1
    check(fits, "inner_eps", inner_eps, "a number between 0 and 1")
    check(jvp in _PRODUCTS, "jvp", jvp, "'reverse' or 'forward'")
    with _outside_of_inference_mode():
        if isinstance(x0, Tensor) and x0.is_inference():
            x0 = x0.clone()
        linearised = _Linearised(f, jvp)
        options = {"shrinks": False, "heeds_check_every": False}
        run = start(linearised, x0, threshold, eps, stop_mode, control, **options)
        iterate = _Iterate(run, warmup, damping)
        while not run.stopped and iterate.affords_more():
            newton = iterate.takes_a_step
            if newton.any():
                goal = inner_eps * iterate.size
                size = min(inner, run.left - 1, iterate.x.shape[1])
                residual = torch.where(rows(newton, iterate.gx), iterate.gx, 0.0)
                step, improved = gmres_cycle(_Step(run, linearised, goal), residual, size)
                if run.resting.all():
                    break
                # Where it is not improved, J has the eigenvalue 1: a plain step.
                iterate.propose(torch.where(rows(improved, step), step, iterate.gx))
            iterate.evaluate()
        return run.result()


class _Iterate:
    """Where each sample is, and where it goes next: all of (B,) are samples, on the host.

    A sample takes plain steps at first, as long as they lower its residual, then full steps of
    Newton's method. It remembers the point of its lowest residual and the step from there. Where a
    plain step was in vain it goes back there; where ``PATIENCE`` steps in a row were, it goes back
    and shortens that step: on the way to a solution Newton's steps often rise first (the watchdog
    of Chamberlain et al. 1982). Samples wait for nobody: what one does costs its mates nothing.
    """

    def __init__(self, run: Run, warmup: int, damping: float):
        self._run, self._damping = run, damping
        self._set(*run.evaluate(run.x0))
        batch = len(self.x)
        self._low_x, self._low_step, self._step = self.x, self.gx, self.gx
        self._low, self._after = np.full((2, batch), np.inf)  # residuals there; one step later
        self._fresh = np.ones(batch, dtype=bool)  # the next step is from its lowest point
        self._plain = np.full(batch, warmup)  # steps left
        self._returns = np.zeros(batch, dtype=bool)
        self._vain, self._tries = np.zeros((2, batch), dtype=np.int64)  # steps; shorter ones
        self._lengths = np.full(batch, float(damping))

    def _set(self, x: Tensor, fx: Tensor, gx: Tensor) -> None:
        self.x, self.fx, self.gx, self.size = x, fx, gx, norms(gx)

    @property
    def takes_a_step(self) -> np.ndarray:
        """The samples that go on by a step of Newton's method."""
        return ~(self._run.resting | self._returns | (self._plain > 0))

    def affords_more(self) -> bool:
        """Whether there may be an evaluation, and a product before it where one is needed."""
        return self._run.affords(1 + bool(self.takes_a_step.any()))

    def propose(self, step: Tensor) -> None:
        """The steps (B, D) of the samples that take one."""
        self._step = step

    def evaluate(self) -> None:
        """Go to the next points."""
        newton, plain, returns = self.takes_a_step, self._plain > 0, self._returns.copy()
        lower = ~returns & (self._fresh | (self.size < self._low))
        if lower.any():
            mask = rows(lower, self.x)
            self._low_x = torch.where(mask, self.x, self._low_x)
            self._low_step = torch.where(mask, self._step, self._low_step)
            self._low, self._vain = (
                np.where(lower, new, old) for new, old in ((self.size, self._low), (0, self._vain))
            )
            self._fresh &= ~lower
        point = self.x + self._damping * self._step
        if plain.any():
            point = torch.where(rows(plain, point), self.fx, point)
        if returns.any():
            lengths = to_device(self._lengths[:, None], point)
            point = torch.where(rows(returns, point), self._low_x + lengths * self._low_step, point)
        self._set(*self._run.evaluate(point))

        self._vain += newton
        self._after = np.where(newton & (self._vain == 1), self.size, self._after)
        self._plain -= plain
        self._come_back(returns)
        self._send_back(plain & (self.size > self._low), np.zeros_like(self._lengths))
        self._plain[self._returns] = 0
        strays = newton & (self._vain >= PATIENCE) & ~(self.size < self._low)
        if strays.any():
            full = np.full_like(self._lengths, self._damping)
            self._send_back(strays, self._shorter(self._after, full))

    def _send_back(self, samples: np.ndarray, lengths: np.ndarray) -> None:
        self._returns |= samples
        self._lengths = np.where(samples, lengths, self._lengths)
        self._tries = np.where(samples, 0, self._tries)

    def _come_back(self, returns: np.ndarray) -> None:
        """Of the samples that were sent back, those go on that are low enough, or tried enough."""
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
        """Where the parabola through both residuals, with the slope of a Newton step, is least."""
        with np.errstate(over="ignore"):
            share = (size / np.maximum(self._low, 1e-300)) ** 2
        least = lengths**2 / np.maximum(share - 1 + 2 * lengths, 1e-300)
        return np.clip(least, 0.1 * lengths, 0.5 * lengths)


class _Step:
    """The system of one step, for :func:`~lib.krylov.gmres_cycle`.

    Samples are solved for one by one, however the solve stops: or their steps would depend on
    their batch mates.
    """

    def __init__(self, run: Run, linearised: "_Linearised", goal: np.ndarray):
        self.run, self._linearised, self._goal = run, linearised, goal

    def product(self, v: Tensor) -> Tensor:
        return multiply(self.run, self._linearised.product, v)

    def enough(self, residual: np.ndarray, size: np.ndarray) -> np.ndarray:
        return residual <= self._goal


class _Linearised:
    """f that remembers, of its last evaluation, how to multiply with the Jacobian there."""

    def __init__(self, f: Map, jvp: str):
        self._f, self._jvp = plain(f), jvp
        self.product: Map | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.product = None  # frees the graph before
        try:
            value, self.product = _PRODUCTS[self._jvp](self._f, z)
        except RuntimeError as error:
            if self._jvp == "forward" or "nference tensor" not in str(error):
                raise
            self._jvp = "forward"  # autograd does not record what is done to such tensors
            value, self.product = _forward(self._f, z)
        return value


@contextmanager
def _outside_of_inference_mode():
    """Where autograd records what it is asked to; nothing else changes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _reverse(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """f(z) and v -> J v, as the derivative of u -> J'u, which is linear in u."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = f(point)
    fits = isinstance(value, Tensor) and value.shape == z.shape  # else the run refuses it
    if not fits or not value.requires_grad:  # or f does not depend on z
        return value, torch.zeros_like

    @cache
    def vjp() -> tuple[Tensor, Tensor | None]:
        """u, and J'u with its graph: made once, where there is a product at all."""
        u = torch.zeros_like(value, requires_grad=True)
        with callers_products():
            back = torch.autograd.grad(value, point, u, create_graph=True, allow_unused=True)
        return u, *back

    def product(v: Tensor) -> Tensor:
        u, back = vjp()
        if back is None or not back.requires_grad:  # zero, such as that of a step function
            return torch.zeros_like(v)
        with callers_products():
            (found,) = torch.autograd.grad(back, u, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if found is None else found

    return value.detach(), product


def _forward(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """f(z) and v -> J v, by forward-mode differentiation."""

    def product(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
        return torch.zeros_like(v) if tangent is None else tangent

    return f(z), product


_PRODUCTS = {"reverse": _reverse, "forward": _forward}
