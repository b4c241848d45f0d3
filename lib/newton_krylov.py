"""Newton's method with GMRES for its linear systems."""

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lib.krylov import System, gmres_cycle
from lib.maps import Affine, Map, plain
from lib.sample_run import start
from lib.solver_run import check, check_count, check_damping, solver_method


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
        inner: products per system at most.
        inner_eps: relative residual at which a system counts as solved.
        damping: length t of a step, in (0, 1].
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
    check(0 < inner_eps < 1, "inner_eps", inner_eps, "between 0 and 1")
    check(jvp in _PRODUCTS, "jvp", jvp, "'reverse' or 'forward'")
    linearised = _Linearised(f, _PRODUCTS[jvp])
    run = start(linearised, x0, threshold, eps, stop_mode, control, shrinks=False)
    x, _, gx = run.evaluate(run.x0)
    while not run.stopped:
        left = min(threshold, run.control.max_nfe or threshold) - run.nfe - run.products
        if left < 2:  # a product, and the evaluation after it
            break
        residual = gx.to(x0.dtype).view(x0.shape)
        zero = torch.zeros_like(residual)
        system = System(
            Affine(linearised.product(), residual, zero),
            zero,
            threshold=min(inner, left - 1) + 2,  # with the two evaluations that are not made
            eps=inner_eps,
            stop_mode="rel",
            control={"stop": "sample"},  # or a sample's steps would depend on its batch mates
        )
        step = gmres_cycle(system, min(inner, left - 1, x.shape[1]))
        run.products += system.run.products
        x, _, gx = run.evaluate(x + damping * step)
    return run.result()


class _Linearised:
    """f that remembers, of its last evaluation, how to multiply with the Jacobian there."""

    def __init__(self, f: Map, make_product: Callable[[Map, Tensor], tuple[Tensor, Map]]):
        self._f, self._make_product = plain(f), make_product
        self._product: Map | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self._product = None  # frees the graph before
        value, self._product = self._make_product(self._f, z)
        return value

    def product(self) -> Map:
        return self._product


def _reverse(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """f(z) and v -> J v, as the derivative of u -> J'u, which is linear in u."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = f(point)
        fits = isinstance(value, Tensor) and value.shape == z.shape  # else the run refuses it
        if not fits or not value.requires_grad:  # or f does not depend on z
            return value, torch.zeros_like
        u = torch.zeros_like(value, requires_grad=True)
        (vjp,) = torch.autograd.grad(value, point, u, create_graph=True, allow_unused=True)
    if vjp is None:
        return value.detach(), torch.zeros_like

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(vjp, u, v, retain_graph=True, allow_unused=True)
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
