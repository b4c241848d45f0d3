"""Calls that torch.compile leaves alone. Importing this module loads the compiler."""

import torch


@torch.compiler.disable(
    reason="a solver's number of steps depends on values: compile f alone, or leave out fullgraph"
)
def call(function, *args, **kwargs):
    """``function(*args, **kwargs)``, run as it is written."""
    return function(*args, **kwargs)
