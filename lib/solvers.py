"""Fixed-point solvers: find z with f(z) = z.

Every solver has the signature ``solver(f, x0, threshold=..., eps=..., stop_mode=...) -> dict`` and
is listed by name in :data:`SOLVERS`. A method only knows how to propose its next point; a
:class:`~lib.solver_run.Run` evaluates f there, keeps the residual traces and the best point, finds
samples that are no longer finite, and decides when to stop.

Example::

    >>> import torch
    >>> from lib.solvers import anderson
    >>> solution = anderson(torch.cos, torch.zeros(1, 1), eps=1e-6)
    >>> round(solution["result"].item(), 4), bool(solution["converged"].all())
    (0.7391, True)

What a solver returns
    ========== ===========================================================================
    result     visited point z of the lowest residual, shape and dtype of ``x0``; a sample
               that is not finite there holds its own best finite iterate. A tensor of its own.
               With best='sample', each sample's own point of its lowest residual
    lowest     residual of that point over the whole batch, in ``stop_mode``
    nstep      index of that point in the traces; with best='sample' the last of those, where
               ``lowest`` may be below all of the trace
    abs_trace  ||f(z) - z|| over the batch, a float per evaluated point, from ``x0`` on
    rel_trace  ||f(z) - z|| / ||f(z)||, likewise
    prot_break True if the iteration diverged (:mod:`lib.divergence`), if it ended far out, or if
               nothing stayed finite
    nfe        number of evaluations of f (the length of the traces)
    converged  (batch,) bool: the sample's own residual at ``result`` is below ``eps``
    residual   (batch,) that residual, in ``stop_mode``; inf if f was never finite
    finite     (batch,) bool: f stayed finite for this sample at every evaluated point (and
               products with its Jacobian did)
    all_finite True if that holds for all of them; a bool on the host
    norms      (2, batch) numpy array on the host: ||f(z) - z|| and ||f(z)|| of each sample at
               ``result``
    sample_nfe (batch,) evaluations that the sample took part in
    products   products with the Jacobian, by the methods that take them
    reason     what ended the solve: 'eps', 'threshold', 'diverged', 'floor', 'max_nfe',
               'max_seconds', or 'stalled' where a Krylov method lowers no residual any more
    abs_lowest, rel_lowest     residual of ``result`` over the batch, either way
    eps, threshold, stop_mode  as given
    ========== ===========================================================================

All of them take the keywords of :class:`~lib.solver_run.Control`: stopping per sample (whose
result differs in a few points: :mod:`lib.sample_run`), rarer checks, a budget of evaluations or of
time. ``x0`` is the initial guess; a good one saves evaluations, and one that is a solution already
costs a single one.

Not converging is a status in this dict; misuse is an :class:`~lib.errors.InputError`.
Nothing is differentiated here (see :mod:`lib.deq`), so solvers run under ``torch.no_grad``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.anderson import anderson
from lib.broyden import broyden
from lib.errors import InputError
from lib.krylov import bicgstab, gmres
from lib.newton_krylov import newton_krylov
from lib.sample_run import start
from lib.solver_run import Control, check_damping, solver_method
from lib.specs import named

__all__ = [
    "ADJOINT_SOLVERS",
    "SOLVERS",
    "anderson",
    "bicgstab",
    "broyden",
    "fixed_point_iteration",
    "get_solver",
    "gmres",
    "newton_krylov",
]


@solver_method
def fixed_point_iteration(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    damping: float = 1.0,
    **control,
) -> dict:
    """Plain (Picard) iteration z_{k+1} = z_k + t (f(z_k) - z_k), t = ``damping`` in (0, 1].

    With t = 1 it converges where f is a contraction. Other arguments and the result are those of
    :func:`~lib.anderson.anderson`; ``threshold`` counts evaluations of f.
    """
    check_damping(damping)
    run = start(f, x0, threshold, eps, stop_mode, control)
    x, fx, gx = run.evaluate(run.x0)
    while not run.stopped and run.nfe < threshold:
        x = fx if damping == 1 else x + damping * gx
        x, fx, gx = run.evaluate(x, out=gx)
    return run.result()


# By name. Forward solvers; and those for adjoints, which are linear, so that Krylov methods apply,
# and which newton_krylov could not differentiate.
SOLVERS: dict[str, Callable[..., dict]] = {
    "anderson": anderson,
    "broyden": broyden,
    "fixed_point_iteration": fixed_point_iteration,
    "newton_krylov": newton_krylov,
}
ADJOINT_SOLVERS: dict[str, Callable[..., dict]] = {
    "anderson": anderson,
    "bicgstab": bicgstab,
    "broyden": broyden,
    "fixed_point_iteration": fixed_point_iteration,
    "gmres": gmres,
}

# Arguments that the caller of a solver sets, not whoever names it.
_CALLERS = {"f", "x0", "threshold", "stop_mode", "name", "keep_inverse"}


def get_solver(solver: str | Callable[..., dict], *, adjoint: bool = False) -> Callable[..., dict]:
    """The solver that a text names, or the callable itself (say ``partial(broyden, eps=1e-9)``).

    A text is a name, or a name with options: ``"anderson:m=4,stop=sample"``.

    Args:
        solver: one of :data:`SOLVERS`.
        adjoint: one of :data:`ADJOINT_SOLVERS` instead.

    Raises:
        InputError: a name or an option that does not exist, naming those that do; a value that
            the solver refuses.
    """
    accepted, others = (ADJOINT_SOLVERS, SOLVERS) if adjoint else (SOLVERS, ADJOINT_SOLVERS)
    if callable(solver):
        name = getattr(getattr(solver, "func", solver), "__name__", "")  # of a partial
        ours = any(getattr(solver, "func", solver) is found for found in others.values())
    else:
        name = str(solver).partition(":")[0].strip()
        ours = name in others
    if ours and name not in accepted:
        why = "differentiates f, and the adjoint is linear already"
        raise InputError(
            f"{name} is no {'backward' if adjoint else 'forward'} solver (it "
            f"{why if adjoint else 'solves linear systems'}): choose from "
            f"{', '.join(sorted(accepted))}"
        )
    if callable(solver):
        return solver
    found = named("solver", solver, accepted, without=_CALLERS, more=Control)
    if ":" in solver:  # try the options on a trivial map, so that a bad value is refused here
        try:
            found(torch.zeros_like, torch.zeros(1, 1, device="cpu"), threshold=3)
        except TypeError as error:
            raise InputError(f"{solver}: {error}") from error
    return found
