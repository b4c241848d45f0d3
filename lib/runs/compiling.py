"""torch.compile for the functions of a fixed-point layer."""

from collections.abc import Callable
from functools import cache

import torch

from lib.errors import InputError

# Most compiled forms of one function: the shapes of training and evaluation, in two dtypes. With
# PyTorch's own limit of 8, further shapes would stay uncompiled, with only a warning.
MAX_FORMS = 64


def compiled(function: Callable, device: torch.device | str = "cpu") -> Callable:
    """Return ``function`` compiled by torch.compile, after a check that this works on ``device``.

    All tensors that ``function`` uses should be its arguments. Then only new shapes are compiled
    again, which takes some seconds.

    Sizes are constants (``dynamic=False``). Otherwise earlier shapes would decide which sizes
    become variables, and so the rounding: a resumed run would not repeat an uninterrupted one.

    Raises:
        InputError: torch.compile does not work here, for example without a C++ compiler.
    """
    _try_compiler(torch.device(device).type)
    for name in ("recompile_limit", "cache_size_limit"):  # new and old name in PyTorch
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, MAX_FORMS)
            break
    return torch.compile(function, dynamic=False)


@cache
def _try_compiler(device: str) -> None:
    x = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: (x + 1).sin())(x)
    except Exception as error:  # a failing compiler can raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"torch.compile does not work here ({first[0]}): install a C++ compiler such as g++, "
            "or switch compilation off"
        ) from error
