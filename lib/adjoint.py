"""The adjoint of an equilibrium: y = J'y + g, the equation behind its implicit gradient."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lib.maps import Affine, Map
from lib.precision import in_float32, solve_in_stages
from lib.solver_stats import all_finite, solve_figures

# An adjoint this far from its equation gives a gradient that is mostly wrong (y = 0 has 1.0).
POOR_ADJOINT = 0.5


class DEQWarning(RuntimeWarning):
    """A solve that ended badly enough to spoil the result or its gradient."""


def warn(message: str) -> None:
    warnings.warn(message, DEQWarning, stacklevel=5)


class Adjoint:
    """Products with J' at a point, and solves with I - J'.

    Args:
        fz: f(point), with its graph.
        point: z*, which requires grad.
        solver: of :mod:`lib.solvers`.
        threshold, stop_mode: for the solver.
        report: called with the solver's dict after each solve.
        again: f, if ``fz`` was computed in half precision: the solve then finishes in float32.
    """

    def __init__(
        self,
        fz: Tensor,
        point: Tensor,
        *,
        solver: Callable[..., dict],
        threshold: int,
        stop_mode: str,
        report: Callable[[dict], None],
        again: Map | None = None,
    ):
        self.fz, self.point = fz, point
        self._solver, self._threshold, self._stop_mode = solver, threshold, stop_mode
        self._report, self._again = report, again

    def product(self, v: Tensor) -> Tensor:
        """J'v, shape and dtype of v."""
        return _vjp(self.fz, self.point, v)

    def solve(
        self, grad: Tensor, start: Tensor | None = None, threshold: int | None = None
    ) -> Tensor:
        """y = J'y + grad, from ``start`` (0), in at most ``threshold`` (else its own) steps."""
        y0 = torch.zeros_like(grad) if start is None else start
        zero = y0 if start is None else None  # J'0 = 0
        options = {
            "threshold": self._threshold if threshold is None else threshold,
            "stop_mode": self._stop_mode,
        }
        step = Affine(self.product, grad, zero)

        def step_in_float32() -> Affine:
            with torch.enable_grad():
                again = self.point.detach().requires_grad_()
                fz = in_float32(self._again)(again)
            return Affine(lambda v: _vjp(fz, again, v), grad)

        with torch.no_grad():
            if self._again is None:
                solution = self._solver(step, y0, **options)
            else:
                solution = solve_in_stages(self._solver, step, step_in_float32, y0, **options)
        self._report(solution)
        return _checked(solution, grad)


def _vjp(fz: Tensor, point: Tensor, v: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(fz, point, v.to(fz.dtype), retain_graph=True, allow_unused=True)
    return torch.zeros_like(v) if found is None else found


def _checked(solution: dict, grad: Tensor) -> Tensor:
    """The adjoint of a solver's dict; a warning where it is none."""
    adjoint, figures = solution["result"], solve_figures(solution)
    if not all_finite(solution):
        # Not a silent zero: a sample whose adjoint fails passes its gradient on as it came.
        keep = solution["finite"].view(-1, *[1] * (grad.dim() - 1))
        adjoint = torch.where(keep, adjoint, grad)
        warn("the adjoint of some samples is not finite: they pass their gradient unsolved")
    elif figures["rel_residual"] > POOR_ADJOINT:
        warn(
            f"the adjoint's relative residual is {figures['rel_residual']:.2g} after "
            f"{figures['nfe']} evaluations, so the gradient is far off: raise b_thres, or "
            "regularise the Jacobian"
        )
    return adjoint


def replace_gradient(fz: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """An identity view of f(z*) whose incoming gradient g is replaced by ``change(g)``.

    The hook sits on the view and may differentiate ``fz`` itself, so its own autograd.grad cannot
    meet the hook again: nothing is ever removed, and any number of forwards may be pending.
    """
    out = fz.view_as(fz)
    if not fz.requires_grad:
        return out  # f depends on nothing that is trained

    def replaced(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None  # an operation behind z has no gradient
        adjoint = change(grad)
        # With create_graph the adjoint would look like a constant to a second derivative.
        return _RefuseDoubleBackward.apply(adjoint, fz) if torch.is_grad_enabled() else adjoint

    out.register_hook(replaced)
    return out


class _RefuseDoubleBackward(torch.autograd.Function):
    """Identity on the adjoint that fails, instead of lying, when it is differentiated."""

    @staticmethod
    def forward(ctx, adjoint: Tensor, anchor: Tensor) -> Tensor:
        return adjoint.view_as(adjoint)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "second derivatives through an equilibrium are not available: its adjoint is the "
            "result of a solver (unroll f, or take the Jacobian loss for regularisation)"
        )
