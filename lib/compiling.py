"""torch.compile, for functions of a fixed-point layer."""

from collections.abc import Callable
from functools import cache

import torch

from lib.errors import InputError

# Compiled forms of one function: shapes of training and evaluation, in two number formats. Beyond
# PyTorch's own limit of 8 further shapes would not be compiled, with no more than a warning.
MAX_FORMS = 64


def compiled(function: Callable, device: torch.device | str = "cpu") -> Callable:
    """``function`` through torch.compile, once it is certain that this works on ``device``.

    Give it a function whose tensors are all arguments: the compiled form is then kept over calls
    and made anew, in some seconds, for other shapes only. Sizes are constants of it, never
    variables: whether they became variables would depend on the shapes met before, and with that
    the rounding, so that a resumed run would not repeat one that was not interrupted.

    Raises:
        InputError: torch.compile does not work here, for want of a C++ compiler say.
    """
    _try_compiler(torch.device(device).type)
    for name in ("recompile_limit", "cache_size_limit"):  # the new name and the old one
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, MAX_FORMS)
            break
    return torch.compile(function, dynamic=False)


@cache
def _try_compiler(device: str) -> None:
    x = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: (x + 1).sin())(x)
    except Exception as error:  # compilers fail in any way they like
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"torch.compile does not work here ({first[0]}): install a C++ compiler such as g++, "
            "or switch compilation off"
        ) from error
