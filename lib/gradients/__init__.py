"""Ways to differentiate an equilibrium z* = f(z*), by name.

With J = df/dz at z* and g = dL/dz, the exact gradient is dL/dtheta = y' df/dtheta with the adjoint
y = (I - J)^-T g. The gradients compute, approximate or avoid y (the last column is the arXiv id):

    ========== ====================================================================== ==========
    ift        solve y = J'y + g with the backward solver                             1909.01377
    shine      y = -H'g with Broyden's H of the forward solve                         2106.00553
    jfb        y = g: one step, no solve                                              2103.12803
    phantom    differentiate a few damped steps after z*, or their Neumann series     2111.05177
    reversible the exact gradient of a coupled iteration that backward undoes         2509.12917
    unroll     plain autograd through the iteration, for reference
    ========== ====================================================================== ==========

``ift``, ``jfb`` and ``phantom`` work with any forward solver; ``shine`` needs broyden.
``reversible`` and ``unroll`` replace the forward solver by an iteration of their own, also in
evaluation; ``f_thres`` counts its evaluations of f.

Options follow the name: ``DEQ(grad="phantom:steps=3,damping=0.8")``, or equivalently the instance
``DEQ(grad=Phantom(steps=3, damping=0.8))``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import InputError, check, check_count, check_number
from lib.gradients.adjoint import Adjoint, Tangents, warn
from lib.gradients.attachment import attach
from lib.gradients.iterations import Iteration, Reversible, Unroll
from lib.solvers.arguments import check_damping, choice, unwrapped
from lib.solvers.broyden import broyden
from lib.solvers.maps import Map, plain


@dataclass(frozen=True)
class Solved:
    """A solved forward pass: the input of every :class:`Gradient`."""

    f: Map  # the layer
    fz: Tensor  # f(z*), with its graph
    point: Tensor  # z*, detached; the input that gave ``fz``
    solution: dict  # the forward solver's
    adjoint: Adjoint  # products with J' and solves with I - J' at z*


class Gradient:
    """Base class of the gradients that work on the result of a forward solver."""

    uses_b_solver = False  # uses the backward solver
    differentiates_state = False  # needs f(z*) as a function of z*
    keeps_inverse = False  # needs the forward solver's estimate of the inverse Jacobian
    order = 1  # the highest order of derivatives that is correct
    by_autograd = False  # attach uses ordinary operations: forward mode needs no own tangent

    def refuse(self, f_solver: Callable[..., dict]) -> None:
        """Raise an InputError for a forward solver that this gradient cannot work with."""

    def refuse_threshold(self, f_thres: int, name: str = "f_thres", more: int = 0) -> None:
        """Accept any threshold: only iterations limit it."""

    def attach(self, solved: Solved) -> Tensor:
        """The output state, a new tensor, with this gradient if autograd records."""
        raise NotImplementedError

    def tangent(self, tangents: Tangents) -> Tensor:
        """The forward-mode tangent of the output state; raises an InputError without one."""
        raise InputError(
            f"grad {type(self).__name__} has no forward mode: take grad ift, jfb or phantom, or "
            "reverse mode (backward)"
        )

    def attach_state(self, f: Map, z: Tensor) -> Tensor:
        """A detached intermediate state with a gradient of its own, for correction losses."""
        return f(z)


@dataclass(frozen=True)
class Implicit(Gradient):
    """y = J'y + g, solved to the tolerance of the backward solver (Bai, Kolter, Koltun 2019).

    With ``order=2`` the output state is one Newton step from that of order 1, z_1:

        z = z_1 + N (f(z_1) - z_1),     N = (I - J)^-1 at z*, a constant

    Where f(z_1) = z_1, the first derivative of z is that of the equilibrium, whatever that of z_1
    is. The second derivative of z is correct because the first of z_1 is; the second of z_1
    cancels. Backward keeps a second evaluation of f, and second derivatives need more solves.

    Args:
        order: the highest order of correct derivatives, 1 or 2; backward refuses a higher one.
    """

    order: int = 1

    uses_b_solver = differentiates_state = True

    def __post_init__(self):
        check(self.order in (1, 2), "order", self.order, "1 or 2")

    def attach(self, solved: Solved) -> Tensor:
        adjoint = solved.adjoint
        if self.order == 1 or not solved.fz.requires_grad:
            return attach(solved.fz, adjoint.solve)
        # The gradient that first reaches z_1 is the residual of the adjoint equation, nearly zero:
        # pass it on without a solve.
        passes = 0

        def first(g: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return g

        def second(g: Tensor) -> Tensor:
            return adjoint.solve(g) if passes else g

        z = attach(solved.fz, second, (first, adjoint.solve_transposed))
        step = plain(solved.f)(z) - z
        return z + attach(step, adjoint.solve, (adjoint.solve, adjoint.solve_transposed))

    def tangent(self, tangents: Tangents) -> Tensor:
        return tangents.solve(tangents.shift)


@dataclass(frozen=True)
class JacobianFree(Gradient):
    """y = g, the gradient of one step at z* (Fung et al. 2021)."""

    by_autograd = True

    def attach(self, solved: Solved) -> Tensor:
        return solved.fz.clone()  # f may return a tensor that f or autograd keeps


@dataclass(frozen=True)
class Phantom(Gradient):
    """The gradient of damped steps h <- t f(h) + (1 - t) h from z* (Geng et al. 2021).

    Unrolled form: the output state is the last h, and backward keeps one evaluation of f per step.
    Neumann form: the output state is f(z*) with y = t sum_{i < steps} B'^i g, B = t J + (1 - t) I,
    and backward keeps one evaluation in all. At an exact fixed point both give the same gradient.
    One step with t = 1 is ``jfb``.

    Args:
        steps: number of steps.
        damping: t, in (0, 1].
        form: 'unrolled' or 'neumann'.
    """

    steps: int = 5
    damping: float = 0.5
    form: str = "unrolled"

    def __post_init__(self):
        check_count("steps", self.steps)
        check_damping(self.damping)
        check(self.form in ("unrolled", "neumann"), "form", self.form, "'unrolled' or 'neumann'")

    @property
    def differentiates_state(self) -> bool:
        return self.form == "neumann"

    @property
    def by_autograd(self) -> bool:
        return self.form == "unrolled"

    def tangent(self, tangents: Tangents) -> Tensor:
        return self._series(tangents.shift, tangents.product)

    def attach(self, solved: Solved) -> Tensor:
        if self.form == "neumann":
            # Bind only the product: the graph must not hold ``solved``, as f may hold its caller.
            product = solved.adjoint.product
            return attach(solved.fz, lambda g: self._series(g, product))
        out = self._steps(solved.f, solved.point.detach(), solved.fz)
        return out.clone() if self.damping == 1 else out

    def attach_state(self, f: Map, z: Tensor) -> Tensor:
        return f(z) if self.form == "neumann" else self._steps(f, z, f(z))

    def _steps(self, f: Map, h: Tensor, fh: Tensor) -> Tensor:
        h = self._damped(h, fh)
        for _ in range(self.steps - 1):
            h = self._damped(h, f(h))
        return h

    def _series(self, first: Tensor, product: Map) -> Tensor:
        total = term = first
        for _ in range(self.steps - 1):
            term = self._damped(term, product(term))
            total = total + term
        return self.damping * total

    def _damped(self, old: Tensor, new: Tensor) -> Tensor:
        return new if self.damping == 1 else self.damping * new + (1 - self.damping) * old


@dataclass(frozen=True)
class Shine(Gradient):
    """y = -H'g with the inverse Jacobian H shared by the forward solver (Ramzi et al. 2021).

    H is Broyden's estimate of the inverse Jacobian of f(z) - z, at the solver's result. A sample
    with ||y|| > ``limit`` ||g||, or with a y that is not finite, takes y = g. The vectors of H are
    kept until backward: one per iteration, or two per update that ``broyden:memory=...`` stores.

    Args:
        limit: the largest accepted ratio ||y|| / ||g||.
        refine: steps of the backward solver that refine y; 0 takes y as it is.
    """

    limit: float = 1.8
    refine: int = 0
    keeps_inverse = True

    def __post_init__(self):
        check_number("limit", self.limit, positive=True)
        if self.refine != 0:
            check_count("refine", self.refine)

    @property
    def uses_b_solver(self) -> bool:
        return self.refine > 0

    differentiates_state = uses_b_solver

    def refuse(self, f_solver: Callable[..., dict]) -> None:
        inner, options = unwrapped(f_solver)
        per_sample = options.get("stop") == "sample"
        if inner is not broyden or per_sample:
            name = getattr(inner, "__name__", repr(inner)) + " per sample" * per_sample
            raise InputError(
                f"grad shine shares the inverse that broyden builds, stopping by the batch, but "
                f"f_solver is {name}: choose f_solver broyden, or grad ift, jfb or phantom"
            )

    def attach(self, solved: Solved) -> Tensor:
        inverse = solved.solution.pop("inverse", None)
        if inverse is None:  # autograd is not recording
            return solved.fz.clone()
        updates, solve = solved.solution["updates"], solved.adjoint.solve
        if updates == 0:
            warn(
                "the forward solve took no step, so shine has no directions and its gradient is "
                "that of jfb: start further away, or take grad ift"
            )

        def adjoint(grad: Tensor) -> Tensor:
            like = inverse.residual
            flat = grad.reshape(len(grad), -1).to(like)
            y = -inverse.transposed(flat, updates)
            norms = [v.double().norm(dim=1, keepdim=True) for v in (y, flat)]
            # `<=` is False for a y that is not finite.
            y = torch.where(norms[0] <= self.limit * norms[1], y, flat)
            y = y.view(grad.shape).to(grad)
            return solve(grad, y, self.refine) if self.refine else y

        return attach(solved.fz, adjoint)


GRADIENTS: dict[str, type] = {
    "ift": Implicit,
    "jfb": JacobianFree,
    "phantom": Phantom,
    "reversible": Reversible,
    "shine": Shine,
    "unroll": Unroll,
}


def unused_settings(grad: Gradient | Iteration) -> list[str]:
    """The settings of a model that have no effect with this gradient."""
    if isinstance(grad, Iteration):
        return ["f_solver", "stop_mode", "b_solver", "b_thres"]
    if not grad.uses_b_solver:
        return ["b_solver", "b_thres"]
    return ["b_thres"] if isinstance(grad, Shine) else []


def get_gradient(grad: str | Gradient | Iteration) -> Gradient | Iteration:
    """The gradient with this name (and options), or the instance itself.

    Raises:
        InputError: the name or an option does not exist, or a value is out of range.
    """
    if isinstance(grad, (Gradient, Iteration)):
        return grad
    return choice("grad", grad, GRADIENTS)()
