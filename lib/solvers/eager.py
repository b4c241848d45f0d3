"""Calls that torch.compile does not trace. Importing this module loads the compiler."""

import torch


@torch.compiler.disable(
    reason="a solver's number of steps depends on values: compile f alone, or leave out fullgraph"
)
def call(function, *args, **kwargs):
    """``function(*args, **kwargs)``, run eagerly."""
    return function(*args, **kwargs)
