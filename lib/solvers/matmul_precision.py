"""Float32 matrix products of solvers in full precision, whatever precision the caller sets for f.

torch.set_float32_matmul_precision is one setting for the whole process, including all threads.
While a solve runs, its own products are in full precision, and f is called under the caller's
setting. Solves in several threads (DataParallel replicas, the backward's own thread) share the
setting that the first of them found. If one solve is inside f while another is in its method, the
other one also computes with the caller's setting.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NAMES = ("highest", "high", "medium")  # of torch.set_float32_matmul_precision
_FULL = ("highest", "ieee")  # full precision, in _NAMES and in torch.backends.cuda.matmul
_lock = threading.Lock()
_solves, _callers = 0, _FULL[0]  # running solves; the setting before the first one


@contextmanager
def full_products():
    """Set full precision; give a function that makes contexts with the caller's setting.

    Give None if the caller's setting is full precision already.
    """
    global _solves, _callers
    with _lock:
        if _solves == 0:
            _callers = _get()
        callers = _callers
        before = _get()
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
    """A context with the caller's setting; without effect outside of a solve."""
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

    def call(z):
        with make_context():
            return f(z)

    return call
