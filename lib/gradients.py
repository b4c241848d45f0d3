"""Ways to differentiate an equilibrium z* = f(z*), by name.

With J = df/dz at z* and g = dL/dz, the exact gradient is dL/dtheta = y' df/dtheta with
y = (I - J)^-T g. What each does instead of, or to find, y:

    ========== ====================================================================== ==========
    ift        solve y = J'y + g by the backward solver                               1909.01377
    shine      y = -H'g with Broyden's H of the forward solve                         2106.00553
    jfb        y = g: one step, no solve                                              2103.12803
    phantom    differentiate a few damped steps after z*, or their Neumann series     2111.05177
    reversible the exact gradient of a coupled iteration that backward undoes         2509.12917
    unroll     plain autograd through the iteration, for reference
    ========== ====================================================================== ==========

``ift``, ``shine``, ``jfb`` and ``phantom`` follow any forward solver (``shine`` needs Broyden's).
``reversible`` and ``unroll`` are iterations of their own: they take the forward solver's place, in
evaluation as well, and ``f_thres`` counts their evaluations of f.

A text names one, with options: ``DEQ(grad="phantom:steps=3,damping=0.8")``; an instance,
``DEQ(grad=Phantom(steps=3, damping=0.8))``, is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.adjoint import Adjoint, Tangents, warn
from lib.attachment import attach
from lib.broyden import broyden
from lib.errors import InputError
from lib.iterations import Iteration, Reversible, Unroll
from lib.maps import Map, plain
from lib.solver_run import check, check_count, check_damping, check_number
from lib.specs import named


@dataclass(frozen=True)
class Solved:
    """What a gradient begins from.

    Attributes:
        f: the layer.
        fz: f(z*), with its graph.
        point: z*, detached; what ``fz`` was computed from.
        solution: the forward solver's dict.
        adjoint: products with J' and solves with I - J' there.
    """

    f: Map
    fz: Tensor
    point: Tensor
    solution: dict
    adjoint: Adjoint


class Gradient:
    """Base of the gradients that follow a forward solver."""

    solves = False  # uses the backward solver
    of_state = False  # needs f(z*) as a function of z*
    keeps_inverse = False  # of the forward solver
    order = 1  # of the derivatives that are right
    is_graph = False  # attach is ordinary operations on f, for which forward mode is right too

    def refuse(self, f_solver: Callable[..., dict]) -> None:
        """Raise an InputError for a forward solver that it cannot follow."""

    def refuse_threshold(self, f_thres: int, name: str = "f_thres", more: int = 0) -> None:
        """Any threshold of a forward solver will do."""

    def attach(self, solved: Solved) -> Tensor:
        """The state to go on with: a value at the fixed point in a tensor of its own, and this
        gradient (if autograd is recording)."""
        raise NotImplementedError

    def tangent(self, tangents: Tangents) -> Tensor:
        """The state's forward-mode tangent, to which the gradient is the transpose.

        Raises:
            InputError: this gradient has none.
        """
        raise InputError(
            f"grad {type(self).__name__} has no forward mode: take grad ift, jfb or phantom, or "
            "reverse mode (backward)"
        )

    def attach_state(self, f: Map, z: Tensor) -> Tensor:
        """The same for a state on the way (detached): one step, as correction losses use it."""
        return f(z)


@dataclass(frozen=True)
class Implicit(Gradient):
    """y = J'y + g, solved to the tolerance of the backward solver (Bai, Kolter, Koltun 2019).

    With ``order=2`` second derivatives are right as well. The state is then a Newton step,

        z = z_1 + N (f(z_1) - z_1),     N = (I - J)^-1 at z*, a constant

    from z_1, the state of order 1. Where f(z_1) = z_1 the first derivative of z is that of the
    equilibrium whatever that of z_1 is, and the second one is, as that of z_1 is right (its second
    derivative cancels). A second evaluation of f is kept; second derivatives take more solves.

    Args:
        order: of the derivatives: 1, or 2. A derivative beyond is refused in backward.
    """

    order: int = 1

    solves = of_state = True

    def __post_init__(self):
        check(self.order in (1, 2), "order", self.order, "1 or 2")

    def attach(self, solved: Solved) -> Tensor:
        adjoint = solved.adjoint
        if self.order == 1 or not solved.fz.requires_grad:
            return attach(solved.fz, adjoint.solve)
        # In the first backward pass what reaches z_1 is the adjoint's residual: nothing to solve.
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

    is_graph = True

    def attach(self, solved: Solved) -> Tensor:
        return solved.fz.clone()  # f may hand out what it keeps, or what autograd saved


@dataclass(frozen=True)
class Phantom(Gradient):
    """The gradient of damped steps h <- t f(h) + (1 - t) h from z* (Geng et al. 2021).

    Unrolled, the state is the last h and each step keeps one evaluation of f. The Neumann form
    gives f(z*) with y = t sum_{i < steps} B'^i g, B = t J + (1 - t) I, and keeps one evaluation;
    at an exact fixed point both are the same gradient. One step with t = 1 is ``jfb``.

    Args:
        steps: how many.
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
    def of_state(self) -> bool:
        return self.form == "neumann"

    @property
    def is_graph(self) -> bool:
        return self.form == "unrolled"

    def tangent(self, tangents: Tangents) -> Tensor:
        return self._series(tangents.shift, tangents.product)

    def attach(self, solved: Solved) -> Tensor:
        if self.form == "neumann":
            product = solved.adjoint.product  # not all of ``solved``: f may refer to its user
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
    """y = -H'g: the forward solver's inverse Jacobian, shared (Ramzi et al. 2021).

    H is Broyden's estimate of the inverse Jacobian of f(z) - z at the step that the solver
    returns. A sample with ||y|| > ``limit`` ||g|| falls back to y = g. The directions that make
    up H are kept until backward: one vector per iteration, or two per update of a
    ``broyden:memory=...``.

    Args:
        limit: of the growth of y.
        refine: steps of the backward solver from there; 0 takes y as it is.
    """

    limit: float = 1.8
    refine: int = 0
    keeps_inverse = True

    def __post_init__(self):
        check_number("limit", self.limit, positive=True)
        if self.refine != 0:
            check_count("refine", self.refine)

    @property
    def solves(self) -> bool:
        return self.refine > 0

    of_state = solves

    def refuse(self, f_solver: Callable[..., dict]) -> None:
        inner, options = getattr(f_solver, "func", f_solver), getattr(f_solver, "keywords", {})
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
            # Not `norms[0] > limit`: what is not finite falls back as well.
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
    """Which settings of a model a gradient makes no use of."""
    if isinstance(grad, Iteration):
        return ["f_solver", "stop_mode", "b_solver", "b_thres"]
    if not grad.solves:
        return ["b_solver", "b_thres"]
    return ["b_thres"] if isinstance(grad, Shine) else []


def get_gradient(grad: str | Gradient | Iteration) -> Gradient | Iteration:
    """The gradient that a text names, or the instance itself.

    Raises:
        InputError: a name or an option that does not exist, or a value out of range.
    """
    if isinstance(grad, (Gradient, Iteration)):
        return grad
    return named("grad", grad, GRADIENTS)()
