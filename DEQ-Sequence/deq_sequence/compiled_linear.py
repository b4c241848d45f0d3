"""A choice that torch.compile takes as a constant. Importing this module loads the compiler."""

import torch

from deq_sequence import linear


@torch.compiler.assume_constant_result
def convolutions_are_faster() -> bool:
    """As in :mod:`deq_sequence.linear`, without being traced."""
    return linear.convolutions_are_faster()
