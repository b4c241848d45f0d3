"""Fixed-point solvers: find z with f(z) = z.

Every solver has the signature ``solver(f, x0, threshold=..., eps=..., stop_mode=...) -> dict`` and
a name in :data:`SOLVERS`. A method only proposes its next iterate. A
:class:`~lib.solvers.solve.Solve` evaluates f there, keeps the traces and the best iterate, finds
samples that are no longer finite, and decides when to stop.

Example::

    >>> import torch
    >>> from lib.solvers import anderson
    >>> solution = anderson(torch.cos, torch.zeros(1, 1), eps=1e-6)
    >>> round(solution["result"].item(), 4), bool(solution["converged"].all())
    (0.7391, True)

What a solver returns
    ========== ===========================================================================
    result     the iterate z with the lowest residual, in the shape and dtype of ``x0``. A sample
               that is not finite there, and with best='sample' every sample, holds its own best
               finite iterate. Shares no memory with ``x0`` or with a value of f
    lowest     residual of ``result`` over the whole batch, in ``stop_mode``
    nstep      index of ``result`` in the traces. With best='sample', the largest index over the
               samples; ``lowest`` may then be below every entry of the trace
    abs_trace  list of ||f(z) - z|| over the batch: one float per evaluation, starting at ``x0``
    rel_trace  list of ||f(z) - z|| / ||f(z)||, likewise
    prot_break True if the iteration diverged or ended far out
               (:class:`~lib.solvers.solve.Divergence`), or if no sample stayed finite
    nfe        number of evaluations of f (the length of the traces)
    converged  (batch,) bool: the sample's own residual at ``result`` is below ``eps``
    residual   (batch,) the sample's own residual, in ``stop_mode``; inf if f was never finite
    finite     (batch,) bool: f, and products with its Jacobian, stayed finite for this sample
    all_finite True if all samples are finite; a bool on the host
    norms      (2, batch) numpy array on the host: ||f(z) - z|| and ||f(z)|| of each sample at
               ``result``
    sample_nfe (batch,) number of evaluations that the sample took part in
    products   number of products with the Jacobian
    reason     what ended the solve: 'eps', 'threshold', 'diverged', 'floor', 'max_nfe',
               'max_seconds', or 'stalled' (a Krylov method no longer lowers any residual)
    abs_lowest residual of ``result`` over the batch, absolute
    rel_lowest the same, relative
    eps        as given
    threshold  as given
    stop_mode  as given
    ========== ===========================================================================

All solvers take the keywords of :class:`~lib.solvers.arguments.Control`: stop per sample, check the
residual less often, limit the evaluations or the time. The dict of a solve that stops per sample
differs: see :mod:`lib.solvers.sample_solve`. A good initial guess ``x0`` saves evaluations; a
solution costs a single one.

A solve that does not converge reports so in this dict. Misuse raises an
:class:`~lib.errors.InputError`. Solvers run under ``torch.no_grad``: :mod:`lib.deq` differentiates
the fixed point.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.errors import InputError
from lib.solvers.anderson import anderson
from lib.solvers.arguments import Control, check_damping, choice, unwrapped
from lib.solvers.broyden import broyden
from lib.solvers.krylov import bicgstab, gmres
from lib.solvers.maps import Map
from lib.solvers.newton_krylov import newton_krylov
from lib.solvers.sample_solve import start
from lib.solvers.solve import solver_method

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
    f: Map,
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    *,
    damping: float = 1.0,
    **control,
) -> dict:
    """Plain (Picard) iteration z_{k+1} = z_k + t (f(z_k) - z_k), t = ``damping`` in (0, 1].

    With t = 1 it converges if f is a contraction. The other arguments and the result are as for
    :func:`~lib.solvers.anderson.anderson`.
    """
    check_damping(damping)
    solve = start(f, x0, threshold, eps, stop_mode, control)
    x, fx, gx = solve.evaluate(solve.x0)
    while not solve.stopped and solve.nfe < threshold:
        x = fx if damping == 1 else x + damping * gx
        x, fx, gx = solve.evaluate(x, out=gx)
    return solve.result()


# By name. An adjoint system is linear: Krylov methods apply, and newton_krylov, which
# differentiates f, does not.
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

# Arguments that a text such as "anderson:m=4" may not set: the code that calls the solver does.
_CALLERS = {"f", "x0", "threshold", "stop_mode", "name", "keep_inverse"}


def get_solver(solver: str | Callable[..., dict], *, adjoint: bool = False) -> Callable[..., dict]:
    """Return the solver that a text names; return a callable as it is.

    Args:
        solver: a name in :data:`SOLVERS`, a name with options (``"anderson:m=4,stop=sample"``), or
            a callable (``partial(broyden, eps=1e-9)``).
        adjoint: look the name up in :data:`ADJOINT_SOLVERS` instead.

    Raises:
        InputError: the name or an option does not exist (the message lists those that do); the
            solver refuses a value; the solver is of the other direction (forward or adjoint).
    """
    accepted, others = (ADJOINT_SOLVERS, SOLVERS) if adjoint else (SOLVERS, ADJOINT_SOLVERS)
    if callable(solver):
        function, _ = unwrapped(solver)
        name = getattr(function, "__name__", "")
        ours = others.get(name) is function
    else:
        name = str(solver).partition(":")[0].strip()
        ours = name in others
    if ours and name not in accepted:
        kind, why = ("forward", "solves linear systems")
        if adjoint:
            kind, why = ("backward", "differentiates f, and the adjoint is linear already")
        listed = ", ".join(sorted(accepted))
        raise InputError(f"{name} is no {kind} solver (it {why}): choose from {listed}")
    if callable(solver):
        return solver
    found = choice("solver", solver, accepted, without=_CALLERS, more=Control)
    if ":" in solver:  # try the options on a trivial map: refuse a bad value here, not in a solve
        try:
            found(torch.zeros_like, torch.zeros(1, 1, device="cpu"), threshold=3)
        except TypeError as error:
            raise InputError(f"{solver}: {error}") from error
    return found
