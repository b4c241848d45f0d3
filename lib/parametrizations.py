r"""Bounded and normalised weights for all layers of a module, in one call.

A layer f settles if df/dz is small enough. These functions replace the weights of linear and
convolutional layers by functions of free parameters (see :mod:`torch.nn.utils.parametrize`)::

    >>> import torch
    >>> from lib import spectral_norm
    >>> layer = spectral_norm(torch.nn.Linear(64, 64), bound=0.9)
    >>> bool(torch.linalg.matrix_norm(layer.weight, ord=2) <= 0.91)
    True

Apply them to the part of a model that acts on z, not to a whole model: a bounded head or injection
loses accuracy for nothing.

While a solver of :class:`lib.deq.DEQ` runs, each weight is computed once and held, without a
graph. The evaluation of f that carries the gradient computes it again, with its graph. ``unroll``
and ``reversible`` compute it at each evaluation. (``torch.nn.utils.parametrize.cached()`` does not
fit around a DEQ: the solver would fill it with weights that have no graph, and a module and its
deepcopy share an entry.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lib.errors import InputError, check
from lib.optimization import norm_except, normalised

_FIRST, _NEXT = 100, 5  # power iterations at the start, and after each change of the weight
_GRID = 16  # side of the image on which a convolution is measured

_local = threading.local()  # .weights: what the solve of this thread holds, or None


@contextmanager
def weights_held() -> Iterator[None]:
    """Within the block, parametrised weights are computed once, without a graph."""
    outer = getattr(_local, "weights", None)
    _local.weights = {} if outer is None else outer
    try:
        yield
    finally:
        _local.weights = outer


class _Parametrization(nn.Module):
    """A function of parameters that a solve computes once."""

    def compute(self, *originals: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *originals: Tensor) -> Tensor:
        held = getattr(_local, "weights", None)
        if held is None:
            return self.compute(*originals)
        if id(self) not in held:
            with torch.no_grad():
                held[id(self)] = self, self.compute(*originals)  # self: its id must stay its own
        return held[id(self)][1]


class WeightNorm(_Parametrization):
    """w = v g / ||v||; see :func:`weight_norm_all`."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def compute(self, g: Tensor, v: Tensor) -> Tensor:
        return normalised(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm_except(weight, self.dim), weight


class SpectralNorm(_Parametrization):
    """w = v / max(1, ||v||_2 / bound); see :func:`spectral_norm`.

    The buffers ``left`` and ``right``, the leading singular vectors, change only in training mode,
    after the weight has changed: both passes belong to the same weight.
    """

    def __init__(self, weight: Tensor, bound: float, groups: int | None):
        super().__init__()
        self.bound, self.groups = bound, groups
        shape = (weight.shape[1],)
        if groups is not None:
            sides = [max(_GRID, side) for side in weight.shape[2:]]
            shape = (1, weight.shape[1] * groups, *sides)
        # A generator of its own: the program's random state stays as it is.
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        right = start.to(weight)
        self.register_buffer("right", right / right.norm())
        self.register_buffer("left", torch.zeros_like(self._image(weight.detach(), right)))
        self._iterate(weight, _FIRST)
        self._seen = None

    def compute(self, weight: Tensor) -> Tensor:
        version = weight.data_ptr(), weight._version
        with torch.autocast(weight.device.type, enabled=False):
            if self.training and version != self._seen:
                self._iterate(weight, _NEXT)
                self._seen = version
            # Copies: the graph keeps them, and load_state_dict writes to the buffers.
            left, right = self.left.clone(), self.right.clone()
            norm = (left * self._image(weight, right)).sum()
            return weight / (norm / self.bound).clamp(min=1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def _iterate(self, weight: Tensor, count: int) -> None:
        left, right = self.left, self.right
        for _ in range(count):
            left = _unit(self._image(weight, right), left)
            right = _unit(self._adjoint(weight, left), right)
        self.left, self.right = _unit(self._image(weight, right), left), right

    def _image(self, weight: Tensor, right: Tensor) -> Tensor:
        """The linear map of the layer: a matrix product, or a circular convolution."""
        if self.groups is None:
            return weight @ right
        padding = [p for side in reversed(weight.shape[2:]) for p in (0, side - 1)]
        return _convolution(F.pad(right, padding, mode="circular"), weight, self.groups)

    def _adjoint(self, weight: Tensor, left: Tensor) -> Tensor:
        if self.groups is None:
            return weight.t() @ left
        kernel = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        kernel = kernel.flip(tuple(range(2, kernel.dim())))
        padding = [p for side in reversed(weight.shape[2:]) for p in (side - 1, 0)]
        return _convolution(F.pad(left, padding, mode="circular"), kernel, self.groups)


def _convolution(x: Tensor, kernel: Tensor, groups: int) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[kernel.dim() - 3](x, kernel, groups=groups)


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    """vector / ||vector||; ``otherwise`` for zero, from which no later weight would lead back."""
    norm = vector.norm()
    return torch.where(norm > 0, vector / norm, otherwise)


def spectral_norm(module: nn.Module, bound: float = 0.9) -> nn.Module:
    """Hold the spectral norm of each weight at or below ``bound``: w = v / max(1, ||v||_2 / bound).

    Power iteration estimates the norm (Miyato et al. 2018, arXiv 1802.05957): 100 iterations at the
    start, then 5 in training mode after each change of the weight. The estimate comes from below:
    the norm may exceed the bound, in our tests by less than 1 % at the start and by less than 0.1 %
    after some steps of training.

    The norm of a convolution is that of the operator: the circular convolution of stride 1 on an
    image of side 16, or of the side of the kernel if that is larger. Other strides and zero padding
    have no larger norms; a larger image may exceed it by a few per cent.
    (``torch.nn.utils.parametrizations.spectral_norm`` takes the norm of the reshaped kernel: for
    k x k, that of the operator is up to sqrt(k k) times larger.)

    Args:
        module: changed in place and returned; each Linear, Conv1d to Conv3d and ConvTranspose in
            it. The parameter ``weight`` becomes ``parametrizations.weight.original``.
        bound: the largest spectral norm, positive.

    Raises:
        InputError: the bound is not positive, or the module has no such weight, or one that is
            parametrised already or not initialised.
    """
    check(0 < bound < float("inf"), "bound", bound, "positive and finite")

    def norm_of(layer: nn.Linear | _ConvNd) -> SpectralNorm:
        return SpectralNorm(layer.weight, float(bound), getattr(layer, "groups", None))

    return _parametrize(module, norm_of)


def weight_norm_all(module: nn.Module, dim: int = 0) -> nn.Module:
    """Write each weight as w = v g / ||v|| (Salimans and Kingma 2016, arXiv 1602.07868).

    The initial weights are unchanged. g is a free parameter, so weight norm bounds nothing.

    Args:
        module: changed in place, as by :func:`spectral_norm`. The parameter ``weight`` becomes
            ``parametrizations.weight.original0`` (g) and ``original1`` (v).
        dim: each index of this dimension has its own norm.

    Raises:
        InputError: as :func:`spectral_norm`.
    """
    return _parametrize(module, lambda layer: WeightNorm(dim))


class ContractiveLayer(nn.Module):
    """A layer to start from: f(z, x) = tanh(W z + U x + b) with ||W||_2 <= bound < 1.

    tanh has slopes of at most 1, so f multiplies distances between states by ``bound`` at most,
    whatever its parameters become: the fixed point exists, it is unique, and every solver finds it.
    U and b are free::

        >>> import torch
        >>> from lib import DEQ, ContractiveLayer
        >>> layer, deq = ContractiveLayer(8, 64), DEQ()
        >>> u = layer.inject(torch.randn(2, 8))  # does not depend on z: once, outside of f
        >>> deq(lambda z: layer(z, u), torch.zeros_like(u)).z.shape
        torch.Size([2, 64])

    Args:
        inputs, size: sizes of x and z.
        bound: the largest spectral norm of W; an InputError if not between 0 and 1.
    """

    def __init__(self, inputs: int, size: int, bound: float = 0.9):
        super().__init__()
        check(0 < bound < 1, "bound", bound, "between 0 and 1 for a contraction")
        self.inject = nn.Linear(inputs, size)  # U x + b
        self.mix = spectral_norm(nn.Linear(size, size, bias=False), bound)  # W z

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """f(z) for z and u = ``inject(x)``, both (B, ..., size)."""
        return torch.tanh(self.mix(z) + u)


def _parametrize(module: nn.Module, make: Callable[[nn.Linear | _ConvNd], nn.Module]) -> nn.Module:
    kinds = (nn.Linear, _ConvNd)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}
    if not layers:
        raise InputError(f"{type(module).__name__} has no Linear or convolution to normalise")
    for name, layer in layers.items():
        what = f"the weight of {name or type(layer).__name__}"
        if parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
            raise InputError(f"{what} is parametrised already: normalise each layer once")
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise InputError(f"{what} is not initialised: run the lazy module once before")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", make(layer).train(layer.training))
    return module
