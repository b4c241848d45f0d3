"""What a map f may be, or offer, beside f(z).

Solvers and gradients take any function of the state. Three things make it a better one; wrappers
of f (autocast, lists of tensors) keep them by :func:`transformed`:

- ``f.plain`` is the same map in operations that all have second derivatives, where f has none
  (fused kernels, compiled code).
- ``f.select(rows)`` is the map of the samples ``rows`` (a LongTensor) alone. With it, a solve that
  stops per sample evaluates f on the samples that are left.
- :class:`Affine` says that f(z) = J z + b, with products J v to be had without b.
"""

from collections.abc import Callable
from copy import copy

from torch import Tensor

Map = Callable[[Tensor], Tensor]


class Affine:
    """z -> J z + b, from a function that multiplies with J.

    Args:
        product: v -> J v, both (B, ...), every sample by itself.
        shift: b, (B, ...).
        zero: the tensor of zeros that a solve starts from: its image is b, and costs no product
            as long as it is not written to.
    """

    def __init__(self, product: Map, shift: Tensor, zero: Tensor | None = None):
        self.product, self.shift, self.zero = product, shift, zero
        self._version = None if zero is None else zero._version

    def __call__(self, z: Tensor) -> Tensor:
        if self._is_zero(z):
            return self.shift.clone()
        return self.product(z) + self.shift

    def _is_zero(self, z: Tensor) -> bool:
        zero = self.zero
        if zero is None or zero._version != self._version:
            return False
        return z.data_ptr() == zero.data_ptr() and z.shape == zero.shape


def plain(f: Map) -> Map:
    """f in operations that have second derivatives."""
    return getattr(f, "plain", f)


def transformed(f: Map, change: Callable[[Map], Map]) -> Map:
    """``change(f)``, offering what f offers. A change of an affine map must keep its shapes."""
    if isinstance(f, Affine):
        out = copy(f)
        out.product = change(f.product)
        return out
    out = change(f)
    if hasattr(f, "plain"):
        out.plain = change(f.plain)
    if hasattr(f, "select"):
        out.select = lambda rows: transformed(f.select(rows), change)
    return out
