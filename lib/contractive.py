"""A layer to start from: a contraction, whatever its parameters become."""

import torch
from torch import Tensor, nn

from lib.errors import check
from lib.parametrizations import spectral_norm


class ContractiveLayer(nn.Module):
    r"""f(z, x) = tanh(W z + U x + b) with ||W||_2 <= bound < 1.

    tanh has slopes of at most 1, so f multiplies distances between states by ``bound`` at most:
    the fixed point exists, it is unique, and plain iteration and every solver find it.
    U and b are free::

        >>> import torch
        >>> from lib import DEQ, ContractiveLayer
        >>> layer, deq = ContractiveLayer(8, 64), DEQ()
        >>> u = layer.inject(torch.randn(2, 8))  # does not depend on z: once, outside of f
        >>> deq(lambda z: layer(z, u), torch.zeros_like(u)).z.shape
        torch.Size([2, 64])

    Args:
        inputs: size of x.
        size: size of z.
        bound: the largest spectral norm of W, between 0 and 1.

    Raises:
        InputError: the bound is not between 0 and 1.
    """

    def __init__(self, inputs: int, size: int, bound: float = 0.9):
        super().__init__()
        check(0 < bound < 1, "bound", bound, "between 0 and 1 for a contraction")
        self.inject = nn.Linear(inputs, size)  # U x + b
        self.mix = spectral_norm(nn.Linear(size, size, bias=False), bound)  # W z

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """f(z) for z (B, ..., size) and u = ``inject(x)`` of the same shape."""
        return torch.tanh(self.mix(z) + u)
