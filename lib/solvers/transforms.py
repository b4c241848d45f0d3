"""Detect the PyTorch transforms that a solve runs inside, and refuse or bypass them.

A solver reads residuals to decide how often it calls f, so none of them can trace it. torch.compile
is bypassed; torch.func, torch.export and batched gradients are refused. Forward-mode
differentiation is detected: a tangent needs its own solve.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lib.errors import InputError

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def refuse_transforms() -> None:
    """Refuse a call inside torch.func or torch.export."""
    if torch.compiler.is_exporting():
        raise InputError(
            "a solve cannot be exported, because its number of steps depends on values: export f "
            "alone (one evaluation) and solve around it"
        )
    # torch.func.linearize and make_fx trace without an interpreter; fake tensors have no values.
    modes = torch._C._TorchDispatchModeKey
    traced = any(torch._C._get_dispatch_mode(mode) for mode in (modes.PROXY, modes.FAKE))
    if traced or _functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "a solve inside a transform of torch.func (grad, vmap, jvp, ...), or traced, is not "
            "possible, because its number of steps depends on values: use torch.autograd instead "
            "(grad, backward, functional.jacobian, one by one)"
        )


def outside_of_compiler(function: Callable) -> Callable:
    """Decorator: torch.compile calls this function without tracing it.

    Traced, a model would break into dozens of graphs, recompiled for each shape of the history. An
    f that is itself compiled stays compiled.
    """

    @functools.wraps(function)
    def called(*args, **kwargs):
        if torch.compiler.is_compiling():  # True only while the compiler traces
            # It loads the compiler, which is in use anyway.
            from lib.solvers.eager import call

            return call(function, *args, **kwargs)
        return function(*args, **kwargs)

    return called


def refuse_batched(value: Tensor | None) -> None:
    """Refuse, by a RuntimeError, a gradient or tangent that holds a batch of directions."""
    if value is None:
        return
    if _functorch.is_batchedtensor(value) or _functorch.is_legacy_batchedtensor(value):
        raise RuntimeError(
            "a batch of gradients or tangents (is_grads_batched, vectorize=True) cannot go through "
            "an equilibrium at once, because each needs a solve: take them one after the other"
        )


def differentiating_forward() -> bool:
    """Whether a dual level is open."""
    return forward_ad._current_level >= 0


def tangent_of(value: Tensor) -> Tensor | None:
    """The forward-mode tangent of a tensor, if any."""
    if not differentiating_forward():
        return None
    return forward_ad.unpack_dual(value).tangent
