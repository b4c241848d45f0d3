"""Number formats of f and of the methods: autocast, solves in stages, float32 matrix products."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lib.errors import InputError
from lib.solvers.arguments import accepts
from lib.solvers.maps import Map, transformed
from lib.solvers.stats import all_finite

# Relative residual at which a solve in half precision hands over to float32: above the level at
# which bfloat16 stalls (7e-3 in the published image models).
COARSE_EPS = 1e-2

AMP = ("none", "bf16")  # the values that both trainers accept

# torch.set_float32_matmul_precision is one setting for all threads. While a solve runs, its own
# products are in full precision, and f is called under the caller's setting. Solves in several
# threads (DataParallel replicas, the backward's own thread) share the setting that the first of
# them found; while one is inside f, the others' methods compute with it too.
_NAMES = ("highest", "high", "medium")
_FULL = ("highest", "ieee")  # full precision, in _NAMES and in torch.backends.cuda.matmul
_lock = threading.Lock()
_solves, _callers = 0, _FULL[0]  # running solves; the setting before the first one


def autocast(amp: str, device: torch.device):
    """The context for mixed precision: bfloat16 inside f; solver states stay float32.

    Raises:
        InputError: ``amp`` is not in :data:`AMP`.
    """
    if amp not in AMP:
        raise InputError(f"mixed precision {amp!r}: choose from {', '.join(AMP)}")
    return torch.autocast(device.type, torch.bfloat16) if amp == "bf16" else nullcontext()


def allow_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions on the GPU round their factors to TF32.

    TF32 has the 10 mantissa bits of half precision and the range of float32. The setting has no
    effect on the CPU or on GPUs before Ampere.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def half_precision(state: Tensor) -> bool:
    """Whether autocast makes f round more coarsely than the dtype of ``state``."""
    kind = state.device.type
    return (
        torch.amp.is_autocast_available(kind)  # not on the meta device
        and torch.is_autocast_enabled(kind)
        and state.dtype == torch.float32
        and torch.finfo(torch.get_autocast_dtype(kind)).eps > torch.finfo(state.dtype).eps
    )


def in_float32(f: Map) -> Map:
    """f with autocast switched off."""

    def change(f: Map) -> Map:
        def precise(z: Tensor) -> Tensor:
            with torch.autocast(z.device.type, enabled=False):
                return f(z)

        return precise

    return transformed(f, change)


def same_autocast(device: torch.device):
    """A function that makes, at any later time, a context with the current autocast setting."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):  # the meta device
        return nullcontext
    options = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
    return lambda: torch.autocast(kind, **options)


def solve_in_stages(
    solver: Callable,
    f: Callable,
    make_precise: Callable[[], Callable],
    z0: Tensor,
    *,
    threshold: int,
    stop_mode: str,
    **options,
) -> dict:
    """Solve with f in half precision; finish in float32 if the tolerance requires it.

    If the first stage ends at a relative residual of :data:`COARSE_EPS`, and evaluations are left,
    the second starts from its result. A solver without an argument ``floor`` has no second stage.

    Args:
        f: the map in half precision, on float32 states.
        make_precise: makes the map in float32, for the second stage.
        threshold: for both stages together; a budget that a partial sets is for each.
        solver, z0, stop_mode, options: as in :mod:`lib.solvers`.

    Returns:
        The solver's dict. The traces (with ``nstep``), the counts of evaluations and products, and
        the finite flags cover both stages. All other entries are from the last stage that ran.
    """
    options = options | {"stop_mode": stop_mode}
    if not accepts(solver, "floor"):
        return solver(f, z0, threshold=threshold, **options)
    coarse = solver(f, z0, threshold=threshold, floor=COARSE_EPS, **options)
    if not {"nfe", "products", "rel_lowest", "lowest", "eps"} <= set(coarse):
        return coarse  # a user's own solver that accepts any keyword
    left = threshold - coarse["nfe"] - coarse["products"]
    rounding = coarse["rel_lowest"] < COARSE_EPS
    if left < 1 or not rounding or coarse["lowest"] < coarse["eps"]:
        return coarse
    fine = solver(make_precise(), coarse["result"], threshold=left, **options)
    for name in ("abs_trace", "rel_trace", "nfe", "products", "sample_nfe"):
        fine[name] = coarse[name] + fine[name]
    fine["nstep"] += coarse["nfe"]
    fine["finite"] = fine["finite"] & coarse["finite"]
    fine["all_finite"] = all_finite(fine) and all_finite(coarse)
    return fine | {"threshold": threshold}


@contextmanager
def full_products():
    """Set full precision; give a function that makes contexts with the caller's setting.

    It is None if the caller's setting is full precision already.
    """
    global _solves, _callers
    with _lock:
        before = _get()
        if _solves == 0:
            _callers = before
        callers = _callers
        if callers not in _FULL:
            _solves += 1
            _set(_FULL[0] if callers in _NAMES else _FULL[1])
    if callers in _FULL:
        yield None
        return
    try:
        yield lambda: _setting(callers)
    finally:
        with _lock:
            _solves -= 1  # the last solve restores the setting that the first one found
            _set(before if _solves else callers)


def callers_products() -> AbstractContextManager:
    """A context with the caller's setting."""
    return _setting(_callers) if _solves else nullcontext()


@contextmanager
def _setting(precision: str):
    before = _get()
    _set(precision)
    try:
        yield
    finally:
        _set(before)


def _get() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch's newer API, which the older getter refuses
        return str(torch.backends.cuda.matmul.fp32_precision)


def _set(precision: str) -> None:
    if precision in _NAMES:
        torch.set_float32_matmul_precision(precision)
    else:
        torch.backends.cuda.matmul.fp32_precision = precision


def in_context(make_context: Callable[[], AbstractContextManager], f: Callable) -> Callable:
    """f, called within a new context at every call."""

    def call(*args, **kwargs):
        with make_context():
            return f(*args, **kwargs)

    return call
