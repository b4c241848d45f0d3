"""The pieces of the multiscale layer f: residual block, fusion, post-fusion.

GroupNorm has ``groups`` groups; none of these convolutions has a bias. Names and order follow the
published state dicts.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import InputError
from lib.layer_utils import conv3x3, conv5x5
from lib.optimization import VariationalHidDropout2d, WeightNorm, weight_norm


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also takes a single value per group: then it returns its bias.

    PyTorch refuses that for a batch of one image and not for more, but a model must take images
    of any size in any number.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(groups: int, channels: int, affine: bool) -> GroupNorm:
    """GroupNorm that says what fits together."""
    if channels % groups:
        raise InputError(
            f"{channels} channels do not split into {groups} groups: choose MODEL.NUM_GROUPS so "
            "that it divides NUM_CHANNELS and EXPANSION_FACTOR * NUM_CHANNELS"
        )
    return GroupNorm(groups, channels, affine=affine)


def _normed(conv: nn.Conv2d) -> WeightNorm:
    return weight_norm(conv, ["weight"])[1]


class ResidualBlock(nn.Module):
    """t = relu(GN1(conv1(z))); t = drop(conv2(t)) + x; out = GN3(relu(GN2(t) + z)).

    Args:
        channels: C of the branch.
        inner: channels between the convolutions.
        big_kernels: how many of the two convolutions, from the first, are 5x5 instead of 3x3.
        groups, affine, dropout, wnorm: as in the configuration.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        big_kernels: int,
        *,
        groups: int,
        affine: bool,
        dropout: float,
        wnorm: bool,
    ):
        super().__init__()
        first, second = (conv5x5 if big_kernels > n else conv3x3 for n in (0, 1))
        self.conv1 = first(channels, inner)
        self.gn1 = group_norm(groups, inner, affine)
        self.conv2 = second(inner, channels)
        self.gn2 = group_norm(groups, channels, affine)
        self.gn3 = group_norm(groups, channels, affine)
        self.drop = VariationalHidDropout2d(dropout)
        self._norms = {}
        if wnorm:
            self._norms = {name: _normed(getattr(self, name)) for name in ("conv1", "conv2")}

    def reset(self, z: Tensor) -> None:
        """Compute the weights and draw the mask of one forward, for states like z."""
        for name, norm in self._norms.items():
            norm.reset(getattr(self, name))
        self.drop.reset_mask(*z.shape, device=z.device, dtype=z.dtype)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """z and the injection x: (B, C, H, W); None injects nothing."""
        t = F.relu(self.gn1(self.conv1(z)))  # (B, inner, H, W)
        t = self.drop(self.conv2(t))
        if x is not None:
            t = t + x
        return self.gn3(F.relu(self.gn2(t) + z))


class Branch(nn.Module):
    """The residual blocks of one resolution; the first takes the injection."""

    def __init__(self, n_blocks: int, *args, **options):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(*args, **options) for _ in range(n_blocks))

    def reset(self, z: Tensor) -> None:
        for block in self.blocks:
            block.reset(z)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            z, x = block(z, x), None
        return z


class FuseFromLower(nn.Module):
    """From a lower resolution: conv1x1, GroupNorm, nearest upsampling by ``factor``."""

    def __init__(self, channels: int, out_channels: int, factor: int, groups: int, affine: bool):
        super().__init__()
        self.factor = factor
        self.net = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, out_channels, 1, bias=False),
                gnorm=group_norm(groups, out_channels, affine),
            )
        )

    def forward(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """y (B, C, h, w) -> (B, C', *size). An odd height or width cuts the last row or column,
        so that pixel (i, j) of y still covers the pixels from (factor i, factor j) on."""
        y = F.interpolate(self.net(y), scale_factor=self.factor, mode="nearest")
        return y[..., : size[0], : size[1]]


class FuseFromHigher(nn.Module):
    """From a higher resolution: ``steps`` times conv3x3 with stride 2, GroupNorm, relu.

    The channels change in the last step, which has no relu.
    """

    def __init__(self, channels: int, out_channels: int, steps: int, groups: int, affine: bool):
        super().__init__()
        self.net = nn.Sequential()
        for last in [False] * (steps - 1) + [True]:
            out = out_channels if last else channels
            step = OrderedDict(
                conv=conv3x3(channels, out, stride=2), gnorm=group_norm(groups, out, affine)
            )
            if not last:
                step["relu"] = nn.ReLU(inplace=True)
            self.net.append(nn.Sequential(step))

    def forward(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """y (B, C, h, w) -> (B, C', *size)."""
        return self.net(y)


class PostFusion(nn.Module):
    """relu, conv1x1, GroupNorm."""

    def __init__(self, channels: int, groups: int, affine: bool, wnorm: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.gnorm = group_norm(groups, channels, affine)
        self._norm = _normed(self.conv) if wnorm else None

    def reset(self) -> None:
        if self._norm is not None:
            self._norm.reset(self.conv)

    def forward(self, y: Tensor) -> Tensor:
        return self.gnorm(self.conv(F.relu(y)))
