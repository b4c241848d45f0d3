r"""The DEQ wrapper: find z* = f(z*), re-attach it to autograd, report what the solvers did.

Forward, a solver runs without autograd and f is applied once more at its result, so that one
evaluation of f is all that backward keeps, however many iterations the solver ran. Backward, by
the implicit function theorem,

    dL/dtheta = y' df/dtheta,      y' = dL/dz' (I - J)^-1,    J = df/dz at z*

where y is the fixed point of y -> J'y + dL/dz and is found by a solver too (Bai, Kolter and
Koltun 2019, arXiv 1909.01377).

Example (a layer of a notebook's own)::

    >>> import torch
    >>> from lib.deq import DEQ
    >>> deq = DEQ(f_solver="anderson", b_solver="broyden")
    >>> weight = torch.tensor(0.5, requires_grad=True)
    >>> x = torch.ones(1, 3)
    >>> solution = deq(lambda z: torch.tanh(weight * z + x), torch.zeros(1, 3))
    >>> solution.z.sum().backward()
    >>> deq.stats.backward.last["rel_residual"] < 1e-3
    True

Under autocast f runs in bfloat16 (or half) precision, whose rounding is a floor for the residual:
a solve that asks for less goes there first and finishes with f in float32 (see
:func:`solve_in_stages`). States and residuals are float32 throughout.

A list of tensors is one state: pass ``deq(f, list2vec(z0_list))`` and let f begin with
``vec2list`` and end with ``list2vec``, or hand the list over as it is: then f maps a list to a
list and the result is a list.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from lib.errors import InputError
from lib.jacobian import jac_loss_estimate, power_method
from lib.layer_utils import list2vec, vec2list
from lib.solvers import get_solver

# An adjoint this far from its equation gives a gradient that is mostly wrong (y = 0 has 1.0).
POOR_ADJOINT = 0.5
# Where a solve in half precision hands over to float32, in the relative residual: above the level
# at which bfloat16 alone stalls, 7e-3 in the published image models.
COARSE_EPS = 1e-2
SRADIUS_ITERS = 150  # products with the Jacobian that models spend on one spectral radius


class DEQWarning(RuntimeWarning):
    """A solve that ended badly enough to spoil the result or its gradient."""


def solve_figures(solution: dict) -> dict:
    """nfe, both residuals and ``broken`` of one solve, from a solver's dict.

    A user's own solver may return fewer keys than ours: without traces the residuals are NaN.
    """
    index = solution.get("nstep", -1)
    absolute, relative = (solution.get(f"{mode}_trace") or [nan] for mode in ("abs", "rel"))
    return {
        "nfe": solution.get("nfe", len(absolute)),
        "abs_residual": float(absolute[index]),
        "rel_residual": float(relative[index]),
        "broken": bool(solution.get("prot_break", False)) or not _all_finite(solution),
    }


def scalars_to(writer, step: int) -> Callable[[str, dict], None]:
    """An ``on_solve`` that gives residuals and nfe to a TensorBoard SummaryWriter."""

    def write(which: str, solution: dict) -> None:
        figures = solve_figures(solution)
        for name in ("abs_residual", "rel_residual", "nfe"):
            writer.add_scalar(f"{which}/{name}", figures[name], step)

    return write


@dataclass
class PassStats:
    """Running statistics of the solves of one pass; a few numbers, however long the run."""

    solves: int = 0
    nfe: int = 0
    abs_residual: float = 0.0
    rel_residual: float = 0.0
    broken: int = 0  # prot_break, or a sample that f made non-finite
    last: dict = field(default_factory=dict)
    last_broken: dict = field(default_factory=dict)  # figures of the last broken one

    def add(self, solution: dict) -> None:
        self.last = solve_figures(solution)
        self.solves += 1
        self.nfe += self.last["nfe"]
        self.abs_residual += self.last["abs_residual"]
        self.rel_residual += self.last["rel_residual"]
        self.broken += self.last["broken"]
        if self.last["broken"]:
            self.last_broken = self.last

    def means(self) -> dict[str, float]:
        """Mean nfe and residuals since the last reset, and the count of broken solves."""
        n = max(self.solves, 1)
        return {
            "nfe": self.nfe / n,
            "abs_residual": self.abs_residual / n,
            "rel_residual": self.rel_residual / n,
            "broken": self.broken,
        }


@dataclass
class SolverStats:
    """Statistics of both passes. Shared by DataParallel replicas, which copy the reference."""

    forward: PassStats = field(default_factory=PassStats)
    backward: PassStats = field(default_factory=PassStats)

    def reset(self) -> None:
        self.forward, self.backward = PassStats(), PassStats()


@dataclass
class Equilibrium:
    """What one forward solve gives.

    z is the state to go on with (f(z*) with the implicit gradient in training, the value of z*
    in evaluation); z_star the solver's result, detached; solution the solver's dict (None for
    a stacked network); jac_loss a scalar; sradius (B, 1). Where they were not asked for, the
    last two are zeros.
    """

    z: Tensor | list[Tensor]
    z_star: Tensor | list[Tensor]
    jac_loss: Tensor
    sradius: Tensor
    solution: dict | None


class DEQ:
    """Solve for the equilibrium of a layer and differentiate it implicitly.

    Args:
        f_solver: forward solver: a name in :data:`lib.solvers.SOLVERS` or any callable with
            their signature, such as ``functools.partial(broyden, eps=1e-9)``.
        b_solver: the same for the adjoint; None takes the forward solver.
        stop_mode: 'rel' or 'abs', for the forward solve.
        b_stop_mode: for the adjoint; None takes ``stop_mode``.

    ``stats`` accumulates what the solvers did; ``stats.reset()`` starts anew.
    """

    def __init__(
        self,
        f_solver: str | Callable = "anderson",
        b_solver: str | Callable | None = None,
        *,
        stop_mode: str = "rel",
        b_stop_mode: str | None = None,
    ):
        self.f_solver, self.b_solver = f_solver, b_solver
        self.stop_mode = stop_mode
        self.b_stop_mode = b_stop_mode or stop_mode
        self.stats = SolverStats()

    @property
    def f_solver(self) -> Callable:
        return self._f_solver

    @f_solver.setter
    def f_solver(self, solver: str | Callable) -> None:
        self._f_solver = get_solver(solver)

    @property
    def b_solver(self) -> Callable:
        return self._f_solver if self._b_solver is None else self._b_solver

    @b_solver.setter
    def b_solver(self, solver: str | Callable | None) -> None:
        self._b_solver = None if solver is None else get_solver(solver)

    def __call__(
        self,
        f: Callable,
        z0: Tensor | Sequence[Tensor],
        *,
        f_thres: int = 30,
        b_thres: int = 40,
        training: bool = True,
        jac_vecs: int = 0,
        sradius_iters: int = 0,
        on_solve: Callable[[str, dict], None] | None = None,
    ) -> Equilibrium:
        """Find z* = f(z*) from z0 and attach the implicit gradient.

        Args:
            f: the layer, a function of the state alone: what does not depend on z (weights,
                masks, injections) belongs into its closure, computed once. If it has no second
                derivatives (fused attention, compiled code), an attribute ``plain`` of it is
                the same map that has them, and is used where the Jacobian loss is taken.
            z0: start, (B, ...) of any rank, or a list of (B, ...) tensors.
            f_thres, b_thres: thresholds of the two solvers.
            training: return f(z*) (True) or the value of z* (False). Gradients are attached
                either way whenever autograd is recording.
            jac_vecs: vectors of the Jacobian loss; 0 does not compute it.
            sradius_iters: products for the spectral radius at z*; 0 does not compute it.
            on_solve: called with ('forward' or 'backward', solver dict) after each solve.
        """
        if not isinstance(z0, Tensor):
            return self._solve_list(
                f,
                z0,
                f_thres=f_thres,
                b_thres=b_thres,
                training=training,
                jac_vecs=jac_vecs,
                sradius_iters=sradius_iters,
                on_solve=on_solve,
            )
        mixed = _half_precision(z0)
        with torch.no_grad():
            options = {"threshold": f_thres, "stop_mode": self.stop_mode}
            if mixed:
                solution = solve_in_stages(self.f_solver, f, lambda: _in_float32(f), z0, **options)
            else:
                solution = self.f_solver(f, z0, **options)
        self._report("forward", solution, on_solve)
        z_star = solution["result"].detach()
        jac_loss, sradius = z_star.new_zeros(()), z_star.new_zeros(len(z_star), 1)

        if sradius_iters:
            with torch.enable_grad():
                point = z_star.detach().requires_grad_()
                sradius = power_method(f(point), point, n_iters=sradius_iters)[1]
        if not torch.is_grad_enabled():
            # Without autograd there is nothing to attach: f(z*) costs one more evaluation.
            z = f(z_star) if training else z_star
            return Equilibrium(z, z_star, jac_loss, sradius, solution)

        point = z_star.detach().requires_grad_()
        fz = getattr(f, "plain", f)(point) if jac_vecs else f(point)
        if jac_vecs:
            jac_loss = jac_loss_estimate(fz, point, vecs=jac_vecs)
        z = self._attach(fz, point, b_thres, on_solve, f if mixed else None)
        if not training:
            z = z_star + (z - z.detach())  # the value of z*, the gradient of f(z*)
        return Equilibrium(z, z_star, jac_loss, sradius, solution)

    def _attach(self, fz: Tensor, point: Tensor, b_thres: int, on_solve, refine) -> Tensor:
        """An identity view of f(z*) whose incoming gradient is replaced by the adjoint.

        The hook sits on the view and differentiates ``fz`` itself, so its own autograd.grad
        cannot meet the hook again: nothing is ever removed, and any number of forwards may be
        pending. ``refine`` is f if ``fz`` was computed in half precision, else None.
        """
        out = fz.view_as(fz)
        if not fz.requires_grad:
            return out  # f depends on nothing that is trained
        # The state itself is not trained: do not leave a gradient on it.
        point.register_post_accumulate_grad_hook(_drop_grad)

        def implicit_gradient(grad: Tensor | None) -> Tensor | None:
            if grad is None:
                return None  # an operation behind z has no gradient
            adjoint = self._adjoint(fz, point, grad, b_thres, on_solve, refine)
            # With create_graph the adjoint would look like a constant to a second derivative.
            return _RefuseDoubleBackward.apply(adjoint, fz) if torch.is_grad_enabled() else adjoint

        out.register_hook(implicit_gradient)
        return out

    def _adjoint(self, fz, point, grad: Tensor, b_thres: int, on_solve, refine) -> Tensor:
        """Solve y = J'y + grad from y = 0."""

        def step_at(fz: Tensor, point: Tensor) -> Callable[[Tensor], Tensor]:
            def step(y: Tensor) -> Tensor:
                if y.data_ptr() == y0.data_ptr() and y0._version == untouched:
                    return grad.clone()  # J'0 = 0
                (vjp,) = torch.autograd.grad(
                    fz, point, y.to(fz.dtype), retain_graph=True, allow_unused=True
                )
                return grad if vjp is None else vjp + grad

            return step

        def step_in_float32() -> Callable[[Tensor], Tensor]:
            with torch.enable_grad():
                again = point.detach().requires_grad_()
                return step_at(_in_float32(refine)(again), again)

        y0 = torch.zeros_like(grad)
        untouched = y0._version  # a solver of the user's own may work in place
        options = {"threshold": b_thres, "stop_mode": self.b_stop_mode}
        with torch.no_grad():
            step = step_at(fz, point)
            if refine is None:
                solution = self.b_solver(step, y0, **options)
            else:
                solution = solve_in_stages(self.b_solver, step, step_in_float32, y0, **options)
        self._report("backward", solution, on_solve)
        adjoint, figures = solution["result"], solve_figures(solution)
        if not _all_finite(solution):
            # Not a silent zero: a sample whose adjoint fails passes its gradient on as it came.
            keep = solution["finite"].view(-1, *[1] * (grad.dim() - 1))
            adjoint = torch.where(keep, adjoint, grad)
            _warn("the adjoint of some samples is not finite: they pass their gradient unsolved")
        elif figures["rel_residual"] > POOR_ADJOINT:
            _warn(
                f"the adjoint's relative residual is {figures['rel_residual']:.2g} after "
                f"{figures['nfe']} evaluations, so the gradient is far off: raise b_thres, or "
                "regularise the Jacobian"
            )
        return adjoint

    def _report(self, which: str, solution: dict, on_solve) -> None:
        getattr(self.stats, which).add(solution)
        if which == "forward" and not _all_finite(solution):
            _warn("f is not finite for some samples: their best finite iterate is used")
        if on_solve is not None:
            on_solve(which, solution)

    def _solve_list(self, f, z0: Sequence[Tensor], **options) -> Equilibrium:
        shapes = [tuple(t.shape[1:]) for t in z0]

        def flattened(f: Callable) -> Callable:
            return lambda z: list2vec(f(vec2list(z, shapes)))

        flat = flattened(f)
        if hasattr(f, "plain"):
            flat.plain = flattened(f.plain)
        found = self(flat, list2vec(z0), **options)
        found.z, found.z_star = vec2list(found.z, shapes), vec2list(found.z_star, shapes)
        return found


def solve_in_stages(
    solver: Callable,
    f: Callable,
    make_precise: Callable[[], Callable],
    z0: Tensor,
    *,
    threshold: int,
    stop_mode: str,
) -> dict:
    """Solve with f in half precision; finish in float32 if the tolerance asks for it.

    The first stage ends where the solver's ``eps`` is met, at the threshold, or at a relative
    residual of :data:`COARSE_EPS`. Only then, and if evaluations are left, the second starts from
    its result. A solver without an argument ``floor`` runs the first stage alone.

    Args:
        solver: with the signature of :mod:`lib.solvers`.
        f: the map in half precision, on float32 states.
        make_precise: makes the map in float32, if it is needed.
        z0, threshold, stop_mode: as for the solver; the threshold is that of both stages.

    Returns:
        The solver's dict, with the traces and evaluations of both stages; the rest is by the last
        of them.
    """
    if "floor" not in inspect.signature(solver).parameters:
        return solver(f, z0, threshold=threshold, stop_mode=stop_mode)
    coarse = solver(f, z0, threshold=threshold, stop_mode=stop_mode, floor=COARSE_EPS)
    left = threshold - coarse["nfe"]
    rounding = coarse["rel_trace"][coarse["nstep"]] < COARSE_EPS
    if left < 1 or not rounding or coarse["lowest"] < coarse["eps"]:
        return coarse
    fine = solver(make_precise(), coarse["result"], threshold=left, stop_mode=stop_mode)
    for name in ("abs_trace", "rel_trace", "nfe"):
        fine[name] = coarse[name] + fine[name]
    fine["nstep"] += coarse["nfe"]
    fine["finite"] = fine["finite"] & coarse["finite"]
    return fine | {"threshold": threshold}


class SolverAttributes:
    """Mixin for models: ``f_solver`` and ``b_solver`` that reach into ``self.deq``.

    Both accept a solver's name or a callable, at any time; an unknown name is refused. A tighter
    ``f_solver`` alone leaves the gradient at the tolerance of ``b_solver``.
    """

    deq: DEQ

    @property
    def f_solver(self) -> Callable:
        return self.deq.f_solver

    @f_solver.setter
    def f_solver(self, solver: str | Callable) -> None:
        self.deq.f_solver = solver

    @property
    def b_solver(self) -> Callable:
        return self.deq.b_solver

    @b_solver.setter
    def b_solver(self, solver: str | Callable | None) -> None:
        self.deq.b_solver = solver


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


def stacked(f: Callable, z0: Tensor | list[Tensor], n_layer: int) -> Tensor | list[Tensor]:
    """f applied ``n_layer`` times with ordinary autograd: the weight-tied network."""
    if n_layer < 1:
        raise InputError(f"the number of stacked layers is {n_layer!r}, but must be at least 1")
    z = z0
    for _ in range(n_layer):
        z = f(z)
    return z


def _half_precision(state: Tensor) -> bool:
    """Whether autocast makes f round more coarsely than the state."""
    kind = state.device.type
    return (
        torch.amp.is_autocast_available(kind)  # not on the meta device
        and torch.is_autocast_enabled(kind)
        and state.dtype == torch.float32
        and torch.finfo(torch.get_autocast_dtype(kind)).eps > torch.finfo(state.dtype).eps
    )


def _in_float32(f: Callable) -> Callable:
    """f outside of autocast."""

    def precise(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return f(z)

    return precise


def _all_finite(solution: dict) -> bool:
    finite = solution.get("finite")
    return finite is None or bool(finite.all())


def _drop_grad(point: Tensor) -> None:
    point.grad = None


def _warn(message: str) -> None:
    warnings.warn(message, DEQWarning, stacklevel=4)
