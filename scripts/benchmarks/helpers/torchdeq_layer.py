"""The package torchdeq in the place of :class:`lib.deq.DEQ`, around our own f."""

from types import SimpleNamespace

from torch import Tensor

from helpers.measure import Counted
from lib.deq import Equilibrium
from lib.errors import InputError


class TorchdeqLayer:
    """torchdeq's ``get_deq``, called as a :class:`lib.deq.DEQ` by a model in training.

    Args:
        options: of torchdeq's ``get_deq``.

    Raises:
        InputError: torchdeq is not installed.
    """

    def __init__(self, **options):
        try:
            from torchdeq import get_deq
        except ImportError as error:
            raise InputError(
                f"torchdeq is not installed ({error}): pip install --no-deps torchdeq==0.1.0"
            ) from error
        self._deq = get_deq(**options)
        unknown = SimpleNamespace(last={})
        self.stats = SimpleNamespace(forward=SimpleNamespace(last={}), backward=unknown)

    def __call__(self, f, z0: Tensor, **_) -> Equilibrium:
        """The equilibrium of f from z0; thresholds and all else are those of ``options``."""
        counted = Counted(f)
        (z,), _ = self._deq(counted, z0)
        self.stats.forward.last = {"nfe": counted.count}
        nothing = z.new_zeros(())
        return Equilibrium(z, z.detach(), nothing, nothing.expand(len(z), 1), None)
