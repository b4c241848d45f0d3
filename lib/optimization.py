"""Weight normalisation and variational dropout, in the forms that a fixed-point layer needs.

f must stay the same map during a solve: each forward pass computes the normalised weight once and
draws each dropout mask once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib.errors import InputError, check

_HELD = "_held_weights"  # key in the module's __dict__: name -> (version, weight) of reset()


class WeightNorm:
    """Recomputes w = v g / ||v|| for a module; returned by :func:`weight_norm`."""

    def __init__(self, names: Sequence[str], dim: int):
        self.names, self.dim = tuple(names), dim

    def compute(self, module: nn.Module, name: str) -> Tensor:
        """The weight, with its graph."""
        g, v = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
        return normalised(v, g, self.dim)

    def reset(self, module: nn.Module) -> None:
        """Compute the weights and hold them until the next call: once per forward pass.

        Without it, or after g or v has changed, every access computes the weight.
        """
        module.__dict__[_HELD] = {
            name: (self._version(module, name), self.compute(module, name)) for name in self.names
        }

    def get(self, module: nn.Module, name: str) -> Tensor:
        """The held weight if it is still valid, else a new one."""
        version, weight = module.__dict__.get(_HELD, {}).get(name, (None, None))
        if weight is None or version != self._version(module, name):
            return self.compute(module, name)
        if torch.is_grad_enabled() and not weight.requires_grad:
            return self.compute(module, name)  # held under no_grad: no gradient for g and v
        return weight

    @staticmethod
    def _version(module: nn.Module, name: str) -> tuple:
        parts = (getattr(module, f"{name}_g"), getattr(module, f"{name}_v"))
        return tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in parts)


def weight_norm(
    module: nn.Module, names: Sequence[str], dim: int = 0
) -> tuple[nn.Module, WeightNorm]:
    """Reparametrise weights as w = v g / ||v|| (Salimans and Kingma 2016, arXiv 1602.07868).

    ``<name>_g`` (the norms, of size 1 in all dimensions except ``dim``) and ``<name>_v`` replace
    each parameter ``<name>``. The initial weight is unchanged. ``module.<name>`` stays readable, as
    a property of the module's class: deepcopy and state dicts contain only the parameters.

    Args:
        module: the module that owns the parameters; changed in place.
        names: parameter names, such as ``['weight']``.
        dim: each index of this dimension has its own norm.

    Returns:
        ``(module, fn)``; ``fn.reset(module)`` computes the weights once and holds them.

    Raises:
        InputError: the module has no parameter of such a name.
    """
    fn = WeightNorm(names, dim)
    for name in fn.names:
        weight = module._parameters.get(name)
        if weight is None:
            known = ", ".join(module._parameters)
            raise InputError(f"{type(module).__name__} has no parameter {name!r} (it has {known})")
        del module._parameters[name]
        module.register_parameter(f"{name}_g", nn.Parameter(norm_except(weight.detach(), dim)))
        module.register_parameter(f"{name}_v", nn.Parameter(weight.detach().clone()))

    def state_without_held(self):
        # Held weights belong to the current forward pass: not into copies and files.
        return {key: value for key, value in self.__dict__.items() if key != _HELD}

    base = type(module)
    properties = {name: property(lambda self, name=name: fn.get(self, name)) for name in fn.names}
    module.__class__ = type(
        f"WeightNorm{base.__name__}", (base,), {**properties, "__getstate__": state_without_held}
    )
    return module, fn


def normalised(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """w = v g / ||v||; the norm is over all dimensions except ``dim``."""
    if v.is_cuda and v.dtype == torch.float64:
        # The fused kernel for GPUs takes norms in float32: w would be off by 6e-8.
        return v * (g / norm_except(v, dim))
    # Fused: one pass over v forward and one backward, instead of a dozen: 12 times faster.
    return torch._weight_norm(  # pyright: ignore[reportPrivateImportUsage]
        v, g, dim % v.dim()
    )


def norm_except(v: Tensor, dim: int) -> Tensor:
    """||v|| for each index of ``dim``, of size 1 in all other dimensions."""
    dims = [d for d in range(v.dim()) if d != dim % v.dim()]
    if not dims:
        return v.abs()  # vector_norm takes no dimensions for all dimensions
    return torch.linalg.vector_norm(v, dim=dims, keepdim=True)


def bernoulli_mask(
    shape: Sequence[int],
    p: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Inverted-dropout mask: Bernoulli(1 - p) / (1 - p), with mean one."""
    return torch.empty(*shape, device=device, dtype=dtype).bernoulli_(1 - p).div_(1 - p)


class VariationalDropout(nn.Module):
    """Dropout with one mask for all time steps, drawn at every call (Gal and Ghahramani 2016).

    With ``dim=3``, ``x`` (N, L, C) gets a mask (N, 1, C). With ``dim=4``, ``x`` (M, N, L, C) gets a
    mask (M, N, 1, C). In evaluation the module is the identity.
    """

    def forward(self, x: Tensor, dropout: float = 0.5, dim: int = 3) -> Tensor:
        check(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        if dim not in (3, 4) or x.dim() != dim:
            raise InputError(f"dim is {dim!r} and x has {x.dim()} dimensions: give 3 or 4, alike")
        if not self.training or dropout == 0:
            return x
        shape = [*x.shape[:-2], 1, x.shape[-1]]
        return x * bernoulli_mask(shape, dropout, device=x.device, dtype=x.dtype)


class _HeldMask(nn.Module):
    """Dropout with a mask that ``reset_mask`` draws and all applications of f share."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        check(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        self.dropout = dropout
        self.mask: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether forward changes its input."""
        return self.training and self.dropout > 0

    def _draw(self, shape: Sequence[int], device, dtype) -> Tensor | None:
        self.mask = None
        if self.active:  # evaluation does not change the random state
            self.mask = bernoulli_mask(shape, self.dropout, device=device, dtype=dtype)
        return self.mask

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        if self.mask is None:
            raise InputError(f"call reset_mask of {type(self).__name__} before its first use")
        return x * self.mask.to(device=x.device, dtype=x.dtype)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class VariationalHidDropout(_HeldMask):
    """One mask value per sample and channel: (B, d, 1) for x (B, d, L), and with ``length_first``
    (B, 1, d) for x (B, L, d)."""

    def __init__(self, dropout: float = 0.0, length_first: bool = False):
        super().__init__(dropout)
        self.length_first = length_first

    def reset_mask(self, bsz: int, d: int, length: int = 1, *, device=None, dtype=None):
        """Draw a mask. It does not depend on ``length``."""
        return self._draw((bsz, 1, d) if self.length_first else (bsz, d, 1), device, dtype)


class VariationalAttnDropout(_HeldMask):
    """One mask value per attention weight: (B, n_head, qlen, klen)."""

    def reset_mask(self, bsz: int, n_head: int, qlen: int, klen: int, *, device=None, dtype=None):
        """Draw a mask."""
        return self._draw((bsz, n_head, qlen, klen), device, dtype)


class VariationalHidDropout2d(_HeldMask):
    """Dropout for feature maps (B, d, H, W).

    With ``spatial`` the mask is (B, d, 1, 1), else (B, d, H, W).
    """

    def __init__(self, dropout: float = 0.0, spatial: bool = True):
        super().__init__(dropout)
        self.spatial = spatial

    def reset_mask(self, bsz: int, d: int, H: int, W: int, *, device=None, dtype=None):
        """Draw a mask."""
        return self._draw((bsz, d, 1, 1) if self.spatial else (bsz, d, H, W), device, dtype)
