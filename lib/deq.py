r"""The DEQ wrapper: find z* = f(z*), re-attach it to autograd, report what the solvers did.

Forward: a solver runs without autograd. Then f is applied once more, with autograd, at its result:
backward keeps one evaluation of f, however many iterations the solver ran.

Backward: by the implicit function theorem,

    dL/dtheta = y' df/dtheta,      y' = dL/dz' (I - J)^-1,    J = df/dz at z*

The backward solver finds y, the fixed point of y -> J'y + dL/dz (Bai, Kolter and Koltun 2019, arXiv
1909.01377). This is ``grad="ift"``; :mod:`lib.gradients` has the others.

Example::

    >>> import torch
    >>> from lib.deq import DEQ
    >>> deq = DEQ(f_solver="anderson", b_solver="broyden")
    >>> weight = torch.tensor(0.5, requires_grad=True)
    >>> x = torch.ones(1, 3)
    >>> solution = deq(lambda z: torch.tanh(weight * z + x), torch.zeros(1, 3))
    >>> solution.z.sum().backward()
    >>> deq.stats.backward.last["rel_residual"] < 1e-3
    True

Under autocast f runs in half precision, states and residuals stay float32, and a solve may finish
with f in float32: see :func:`~lib.solvers.precision.solve_in_stages`.

If the state is a list of tensors, f maps a list to a list, and the result is a list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lib.errors import DEQWarning, InputError, check, check_count
from lib.gradients import Gradient, Solved, get_gradient
from lib.gradients.adjoint import Adjoint, LinearSolve, RadiusWatch, Tangents, warn
from lib.gradients.attachment import own_saved_tensors, recording_for, with_tangent
from lib.gradients.iterations import Iteration
from lib.jacobian import jac_loss_estimate, power_method
from lib.layer_utils import list2vec, vec2list
from lib.parametrizations import weights_held
from lib.solvers import SOLVERS, get_solver
from lib.solvers.arguments import Control, check_stop_mode, unwrapped
from lib.solvers.krylov import gmres
from lib.solvers.maps import Map, lockstep, plain, transformed
from lib.solvers.newton_krylov import newton_krylov
from lib.solvers.precision import half_precision, in_float32, solve_in_stages
from lib.solvers.stats import SolverStats, all_finite, solve_figures
from lib.solvers.transforms import (
    differentiating_forward,
    outside_of_compiler,
    refuse_transforms,
    tangent_of,
)

__all__ = ["DEQ", "DEQWarning", "Equilibrium", "SolverAttributes", "stacked"]

SAME = "same"  # b_solver="same": use the forward solver
UNSOLVED = 0.1  # relative residual above which a forward solve without a tolerance is unsolved
SRADIUS_ITERS = 150  # products with the Jacobian that models spend on one spectral radius


@dataclass
class Equilibrium:
    """The result of one forward solve.

    Attributes:
        z: the output state, with the chosen gradient. Its value is z*; with ``training`` it is
            f(z*), or the last step of a gradient that takes steps.
        z_star: the solver's result, detached.
        jac_loss: the Jacobian loss, a scalar; zero if not requested.
        sradius: the spectral radius, (B, 1); zeros if not requested.
        solution: the solver's dict; None for a stacked network.
        states: the states that ``indexing`` requests, then z; empty without it.
    """

    z: Tensor | list[Tensor]
    z_star: Tensor | list[Tensor]
    jac_loss: Tensor
    sradius: Tensor
    solution: dict | None
    states: list[Tensor | list[Tensor]] = field(default_factory=list)


class DEQ:
    """Solve for the equilibrium of a layer and differentiate it.

    Args:
        f_solver: the forward solver: a name in :data:`lib.solvers.SOLVERS`, possibly with options
            ("anderson:m=4"), or any callable with the signature of these solvers, such as
            ``functools.partial(broyden, eps=1e-9)``.
        b_solver: the backward solver, which solves for the adjoint; given like ``f_solver``, with
            names in :data:`lib.solvers.ADJOINT_SOLVERS` (with gmres and bicgstab). None means gmres
            with the tolerance of the forward solver if that is one of
            :data:`lib.solvers.SOLVERS`, else the forward solver itself. "same" means the forward
            solver; if that is newton_krylov, gmres.
        stop_mode: 'rel' or 'abs': the residual by which the forward solve stops.
        b_stop_mode: the same for the backward solve; None takes ``stop_mode``.
        grad: how to differentiate: a name in :data:`lib.gradients.GRADIENTS`, possibly with
            options ("phantom:steps=3,damping=0.8"), or an instance of one of these classes.
        group: the processes among which f communicates (as under ``fully_shard``, FSDP2), such as
            ``torch.distributed.group.WORLD``: see :func:`~lib.solvers.maps.lockstep`.

    ``stats`` accumulates what the solvers did; ``stats.reset()`` clears it. With ``graphs =
    lib.graphs.Graphs()`` and no group, f and J'v come from CUDA graphs on a GPU.

    Raises:
        InputError: the solver, the gradient or the stop mode does not exist, or they do not fit
            together.
    """

    graphs: Any = None

    def __init__(
        self,
        f_solver: str | Callable = "anderson",
        b_solver: str | Callable | None = None,
        *,
        stop_mode: str = "rel",
        b_stop_mode: str | None = None,
        grad: str | Gradient | Iteration = "ift",
        group: ProcessGroup | None = None,
    ):
        self.stop_mode, self.b_stop_mode = stop_mode, b_stop_mode or stop_mode
        for mode in (self.stop_mode, self.b_stop_mode):
            check_stop_mode(mode)
        self.group = group
        self._grad = get_gradient(grad)
        self.f_solver, self.b_solver = f_solver, b_solver
        self.stats = SolverStats()
        self._said: set[str] = set()  # kinds of warnings already given: each is given once
        self._watch = RadiusWatch()

    @property
    def f_solver(self) -> Callable:
        return self._f_solver

    @f_solver.setter
    def f_solver(self, solver: str | Callable) -> None:
        found = get_solver(solver)
        self._grad.refuse(found)
        self._f_solver = found

    @property
    def b_solver(self) -> Callable:
        own, forward = self._b_solver, self._f_solver
        if callable(own):
            return own
        function, _ = unwrapped(forward)
        linear = function is newton_krylov or (own is None and function in SOLVERS.values())
        return _gmres_like(forward) if linear else forward

    @b_solver.setter
    def b_solver(self, solver: str | Callable | None) -> None:
        if solver is not None and solver != SAME:
            solver = get_solver(solver, adjoint=True)
        self._b_solver = solver

    @property
    def grad(self) -> Gradient | Iteration:
        return self._grad

    @grad.setter
    def grad(self, grad: str | Gradient | Iteration) -> None:
        found = get_gradient(grad)
        found.refuse(self._f_solver)
        self._grad = found

    @outside_of_compiler
    def __call__(
        self,
        f: Map,
        z0: Tensor | Sequence[Tensor],
        *,
        f_thres: int = 30,
        b_thres: int = 40,
        training: bool = True,
        jac_vecs: int = 0,
        sradius_iters: int = 0,
        indexing: Sequence[int] = (),
        on_solve: Callable[[str, dict], None] | None = None,
    ) -> Equilibrium:
        """Find z* = f(z*) from z0 and attach the gradient.

        Args:
            f: the layer, a function of the state alone. Compute what does not depend on z
                (weights, masks, injections) once, and let f hold it in its closure. f may offer
                more than f(z): see :mod:`lib.solvers.maps`.
            z0: the initial guess, (B, ...) of any rank, or a list of (B, ...) tensors.
            f_thres, b_thres: thresholds of the forward and the backward solver.
            training: return f(z*) (True) or the value of z* (False), with the gradient if autograd
                is recording.
            jac_vecs: number of random vectors for the Jacobian loss; 0 skips it.
            sradius_iters: number of products for the spectral radius at z*; 0 skips it.
            indexing: also return, as ``states``, the states after these numbers of evaluations of
                f, in this order, then z: for losses that correct the path to the fixed point (Bai
                et al. 2022, arXiv 2204.08442). To each of them f is applied once (with
                ``phantom``: its steps), and the gradient is that of this application alone. If the
                solve ends before a number, z takes its place.
            on_solve: called with ('forward' or 'backward', solver dict) after each solve.

        Raises:
            InputError: an argument is out of range, or the call is inside an export or a transform
                of torch.func.
        """
        refuse_transforms()
        if self.graphs is not None and self.group is None:
            f = self.graphs.of(f)
        shapes = None  # of the tensors in a list
        if not isinstance(z0, Tensor):
            check(_listed(z0), "z0", type(z0).__name__, "a tensor or a list of tensors")
            shapes = [tuple(t.shape[1:]) for t in z0]
            f, z0 = transformed(f, partial(_flattened, shapes)), list2vec(z0)
        recording, half = torch.is_grad_enabled(), half_precision(z0)
        jac_vecs = jac_vecs if recording else 0
        if self.group is not None:
            self._refuse_with_group(half, bool(indexing), jac_vecs)
        for number in indexing:
            check_count("a number in indexing", number)
        z, states, solution = self._solve(f, z0, f_thres, indexing, half)
        self._report("forward", solution, on_solve)
        if training and recording:
            self._warn_once(solution)
        z_star = solution["result"].detach()
        jac_loss, sradius = z_star.new_zeros(()), z_star.new_zeros(len(z_star), 1)
        if sradius_iters:
            with recording_for("the spectral radius"):
                point = z_star.clone().requires_grad_()
                sradius = power_method(f(point), point, n_iters=sradius_iters)[1]
        grad = self._grad
        if isinstance(grad, Iteration):
            if jac_vecs:
                point = _point(z_star.clone(), requires_grad=True)
                jac_loss = jac_loss_estimate(plain(f)(point), point, vecs=jac_vecs)
        elif recording or training or differentiating_forward():
            z, jac_loss = self._attach(grad, f, solution, jac_vecs, b_thres, on_solve, half)
            values = {0: z_star} | states
            states = {i: grad.attach_state(f, state) for i, state in states.items()}
            if not training:  # the values from the solver, with the chosen gradient
                z, *ends = (values[i] + (t - t.detach()) for i, t in ({0: z} | states).items())
                states = dict(zip(states, ends, strict=True))
        else:
            z = z_star.clone()  # the user may change z in place, and z_star must stay
        # Clone: a number may occur twice, or stand for z; the user may change one in place.
        ends = [states.get(number, z).clone() for number in indexing]
        state, star, *listed = (_parts(t, shapes) for t in (z, z_star, *ends))
        return Equilibrium(
            state, star, jac_loss, sradius, solution, [*listed, state] if indexing else []
        )

    def _refuse_with_group(self, half: bool, indexing: bool, jac_vecs: int) -> None:
        """Refuse what processes would do unequally, and what shards forbid."""
        if half:
            raise InputError(
                "group: under autocast, processes would change to float32 at different times; let "
                "fully_shard compute in bfloat16 instead (its mp_policy)"
            )
        if indexing and not isinstance(self._grad, Iteration):
            raise InputError(
                "group: a solve may end before what indexing names, in some processes only: leave "
                "it out, or take grad='unroll'"
            )
        double_backward = {
            "f_solver newton_krylov": unwrapped(self._f_solver)[0] is newton_krylov,
            "the Jacobian loss": jac_vecs > 0,
            "a gradient of order 2": getattr(self._grad, "order", 1) > 1,
        }
        for what, wanted in double_backward.items():
            if wanted:
                raise InputError(
                    f"group: {what} differentiates the backward of f, which shards do not allow: "
                    "leave it out"
                )

    def _solve(
        self, f: Map, z0: Tensor, f_thres: int, indexing: Sequence[int], half: bool
    ) -> tuple[Tensor, dict[int, Tensor], dict]:
        """The last state, the states after ``indexing`` evaluations of f, and the solver's dict."""
        if isinstance(self._grad, Iteration):
            z, states, solution = self._grad.run(f, z0, f_thres, indexing)
            return z.clone(), {i: state.clone() for i, state in states.items()}, solution
        options = {"threshold": f_thres, "stop_mode": self.stop_mode}
        if self._grad.keeps_inverse and torch.is_grad_enabled():
            options["keep_inverse"] = True
        with torch.no_grad(), weights_held(), lockstep(f, z0, self.group) as f:
            f, visited = _watched(f, indexing) if indexing else (f, {})
            if half:
                solution = solve_in_stages(self.f_solver, f, lambda: in_float32(f), z0, **options)
            else:
                solution = self.f_solver(f, z0, **options)
        return solution["result"], visited, solution

    def _attach(
        self,
        grad: Gradient,
        f: Map,
        solution: dict,
        jac_vecs: int,
        b_thres: int,
        on_solve: Callable[[str, dict], None] | None,
        half: bool,
    ) -> tuple[Tensor, Tensor]:
        """The output state with its gradient, and the Jacobian loss."""
        wanted = jac_vecs > 0 or grad.differentiates_state
        # Clone: the user may change z_star, which shares its memory, in place.
        point = _point(solution["result"].clone(), torch.is_grad_enabled() and wanted)
        with own_saved_tensors():
            form = plain(f) if jac_vecs or grad.order > 1 else f
            fz = form(point)
        jac_loss = jac_loss_estimate(fz, point, vecs=jac_vecs) if jac_vecs else fz.new_zeros(())
        solve = partial(
            LinearSolve,
            self.b_solver,
            b_thres,
            self.b_stop_mode,
            lambda found: self._report("backward", found, on_solve),
            group=self.group,
        )
        adjoint = Adjoint(fz, point, solve(), form if half else None, self._watch)
        if hasattr(f, "product") and point.requires_grad and (product := f.product(point, fz)):
            adjoint.product = product
        z = grad.attach(Solved(f, fz, point, solution, adjoint))
        shift = tangent_of(fz)
        if shift is not None and not grad.by_autograd:
            tangents = Tangents(f, point, shift, solve(name="tangent", of="tangent"))
            z = with_tangent(z, grad.tangent(tangents))
        return z, jac_loss

    def _report(self, which: str, solution: dict, on_solve) -> None:
        getattr(self.stats, which).add(solution)
        if which == "forward" and not all_finite(solution):
            warn("f is not finite for some samples: their best finite iterate is used")
        if on_solve is not None:
            on_solve(which, solution)

    def _warn_once(self, solution: dict) -> None:
        """Warn, once per kind of failure, that training goes on from an unsolved forward pass."""
        found = solve_figures(solution)
        tolerance = solution.get("eps", 0.0)
        what = "diverged" if solution.get("prot_break") else "stopped early"
        solved = solution.get("reason") in ("eps", "floor")
        if not tolerance:  # eps is 0, or a user-defined solver does not report eps
            solved |= not found["rel_residual"] > UNSOLVED
        if (solved and what != "diverged") or what in self._said:
            return
        self._said.add(what)
        mode = solution.get("stop_mode", self.stop_mode)  # user-defined solvers may omit it
        asked = f" (eps {tolerance:.1g}, {mode})" if tolerance else ""
        warn(
            f"a forward solve {what}: its relative residual is {found['rel_residual']:.2g}{asked} "
            f"after {found['nfe']} evaluations, and training goes on from there: raise f_thres, "
            "take another f_solver, or make f contract more (weight norm, Jacobian loss); this is "
            "said once, and stats.forward has the figures"
        )


def _gmres_like(f_solver: Callable) -> Callable:
    """gmres with the tolerance and the stopping options of the forward solver."""
    common = {"eps", *(field.name for field in fields(Control))}
    options = unwrapped(f_solver)[1]
    return partial(gmres, **{name: options[name] for name in options if name in common})


def _listed(state: Any) -> bool:
    return isinstance(state, Sequence) and all(isinstance(t, Tensor) for t in state)


def _parts(z: Tensor, shapes: list[tuple[int, ...]] | None) -> Tensor | list[Tensor]:
    """The tensors of a stacked state, as copies: the user may change one. None: z itself."""
    return z if shapes is None else [part.clone() for part in vec2list(z, shapes)]


def _flattened(shapes: list[tuple[int, ...]], f: Callable) -> Map:
    """A map of lists as a map of stacked states."""

    def flat_f(z: Tensor) -> Tensor:
        parts = f(vec2list(z, shapes))
        gave = [tuple(t.shape[1:]) for t in parts] if _listed(parts) else type(parts).__name__
        if gave != shapes:
            raise InputError(
                f"f must map a list of the shapes {shapes} (without the batch) to the same, but "
                f"gave {gave}"
            )
        return list2vec(parts)

    return flat_f


def _watched(f: Map, indexing: Sequence[int]) -> tuple[Map, dict[int, Tensor]]:
    """f with a recorder, and the dict that it fills: number of an evaluation, from 0 -> point."""
    visited: dict[int, Tensor] = {}
    count = 0

    def change(f: Map) -> Map:
        def watched(z: Tensor) -> Tensor:
            nonlocal count
            if count in indexing:
                visited[count] = z.detach().clone()
            count += 1
            return f(z)

        return watched

    out = transformed(f, change)
    vars(out).pop("select", None)  # it would record a part of the batch
    return out, visited


def _point(state: Tensor, requires_grad: bool) -> Tensor:
    point = state.detach().requires_grad_(requires_grad)
    if requires_grad:  # the state is no parameter: backward must leave no gradient on it
        point.register_post_accumulate_grad_hook(_drop_grad)
    return point


def _of_deq(name: str) -> property:
    """A property that is the attribute ``name`` of ``self.deq``."""
    return property(
        lambda self: getattr(self.deq, name), lambda self, value: setattr(self.deq, name, value)
    )


class SolverAttributes:
    """Mixin for models: ``f_solver``, ``b_solver`` and ``grad`` are those of ``self.deq``.

    ``b_solver = None`` means the forward solver, as in the published models. Another one has its
    own tolerance: a smaller one of ``f_solver`` alone does not improve the gradient.
    """

    deq: DEQ
    f_solver, grad = _of_deq("f_solver"), _of_deq("grad")

    @property
    def b_solver(self) -> Callable:
        return self.deq.b_solver

    @b_solver.setter
    def b_solver(self, solver: str | Callable | None) -> None:
        self.deq.b_solver = SAME if solver is None else solver


def stacked(f: Callable, z0: Tensor | list[Tensor], n_layer: int) -> Tensor | list[Tensor]:
    """Apply f ``n_layer`` times with ordinary autograd: the weight-tied network."""
    check(n_layer >= 1, "the number of stacked layers", n_layer, "at least 1")
    for _ in range(n_layer):
        z0 = f(z0)
    return z0


def _drop_grad(point: Tensor) -> None:
    point.grad = None
