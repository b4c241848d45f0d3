"""Newton's method with GMRES for its linear systems."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lib.krylov import gmres_cycle, multiply, rows
from lib.maps import Map, plain
from lib.norms import norms
from lib.sample_run import start
from lib.solver_run import Run, check, check_count, check_damping, is_number, solver_method


@solver_method
def newton_krylov(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    inner: int = 6,
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
    offers it.

    Args:
        f, x0, eps, stop_mode: as for :func:`~lib.anderson.anderson`.
        threshold: evaluations of f and products with J at most, together.
        inner: products per system at most: a few, or a small threshold ends in the first step.
        inner_eps: relative residual ||g - (I - J) d|| / ||g|| at which a sample's system counts as
            solved: by that factor each step lowers the residual, once near the solution.
        damping: length t of a step, in (0, 1].
        warmup: plain iterations before the first step. At z = 0 layer normalisation has a
            derivative of 1/sqrt(its eps): a Newton step from there leads nearly nowhere.
        jvp: 'reverse' keeps one graph per iterate, and needs second derivatives; 'forward'
            evaluates f anew for each product, and needs forward-mode derivatives.
        **control: see :class:`~lib.solver_run.Control`.

    Returns:
        The dict that :mod:`lib.solvers` describes; the traces are of the iterates.

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
    linearised = _Linearised(f, _PRODUCTS[jvp])
    options = {"shrinks": False, "heeds_check_every": False}
    run = start(linearised, x0, threshold, eps, stop_mode, control, **options)
    x, fx, gx = run.evaluate(run.x0)
    for _ in range(warmup):
        if run.stopped or not run.affords(1):
            break
        x, fx, gx = run.evaluate(fx)
    while not run.stopped and run.affords(2):  # a product, and the evaluation after it
        system = _Step(run, linearised, inner_eps * norms(gx))
        step, improved = gmres_cycle(system, gx, min(inner, run.left - 1, x.shape[1]))
        if run.resting.all():
            break
        step = torch.where(rows(improved, gx), step, gx)  # J has the eigenvalue 1: a plain step
        x, _, gx = run.evaluate(x + damping * step)
    return run.result()


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

    def __init__(self, f: Map, make_product: Callable[[Map, Tensor], tuple[Tensor, Map]]):
        self._f, self._make_product = plain(f), make_product
        self.product: Map | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.product = None  # frees the graph before
        value, self.product = self._make_product(self._f, z)
        return value


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
        return u, *torch.autograd.grad(value, point, u, create_graph=True, allow_unused=True)

    def product(v: Tensor) -> Tensor:
        u, back = vjp()
        if back is None or not back.requires_grad:  # zero, such as that of a step function
            return torch.zeros_like(v)
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
