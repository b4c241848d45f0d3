"""Products of float32 within solvers: all digits, whatever the caller allows f to round to.

torch.set_float32_matmul_precision is one setting for the whole process, threads included. While
any solve runs, its own products are of all digits, and f is called under the setting that was
found. Solves in several threads (replicas of DataParallel, the backward's own) share what the first
of them found; where one is in f while another is in its method, the latter rounds as f does.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NAMES = ("highest", "high", "medium")  # of torch.set_float32_matmul_precision
_FULL = ("highest", "ieee")  # by its name, and by that of torch.backends.cuda.matmul
_lock = threading.Lock()
_solves, _found = 0, _FULL[0]  # that are running; the setting before the first of them


@contextmanager
def full_products():
    """Products of all digits. Gives a maker of contexts with the caller's setting, None if same."""
    global _solves, _found
    with _lock:
        if _solves == 0:
            _found = _get()
        found = _found
        if found not in _FULL:
            before = _get()
            _solves += 1
            _set(_FULL[0] if found in _NAMES else _FULL[1])
    if found in _FULL:
        yield None
        return
    try:
        yield lambda: _setting(found)
    finally:
        with _lock:
            _solves -= 1  # the last one leaves what the first one found
            _set(before if _solves else found)


def callers_products() -> AbstractContextManager:
    """Within a solve: the setting that it found."""
    return _setting(_found) if _solves else nullcontext()


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
    except RuntimeError:  # set by torch's newer names, of which that one knows nothing
        return torch.backends.cuda.matmul.fp32_precision


def _set(precision: str) -> None:
    if precision in _NAMES:
        torch.set_float32_matmul_precision(precision)
    else:
        torch.backends.cuda.matmul.fp32_precision = precision


def within(make_context: Callable[[], AbstractContextManager], f: Callable) -> Callable:
    """f in a context of its own at every call."""

    def call(z):
        with make_context():
            return f(z)

    return call
