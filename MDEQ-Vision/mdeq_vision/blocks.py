"""The pieces of the multiscale layer f: residual block, fusion, post-fusion.

GroupNorm has ``groups`` groups; none of these convolutions has a bias. Names and order follow the
published state dicts.

``prepare`` of a piece gives the tensors that its ``forward`` uses beside its input: the weights,
a mask, an injection. They are fetched once per forward of the model, not once per application of
f, and may come back in another number format, or for some of the samples alone. What nothing else
needs is overwritten on the way.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.layer_utils import conv3x3, conv5x5
from lib.linear import conv2d
from lib.optimization import VariationalHidDropout2d, WeightNorm, weight_norm

Held = list[Any]  # tensors (or None), BlockTensors, or lists of them


class BlockTensors(NamedTuple):
    """What a residual block needs beside z. Nothing else that is held belongs to single samples."""

    weight1: Tensor  # (inner, C, k, k)
    weight2: Tensor  # (C, inner, k, k)
    gn1: Held
    gn2: Held
    gn3: Held
    mask: Tensor | None  # (B, C, 1, 1)
    injection: Tensor | None  # (B, C, H, W)

    def select(self, rows: Tensor) -> "BlockTensors":
        """Those of the samples ``rows`` alone; what samples share is not copied."""
        own = self.mask, self.injection
        mask, injection = (None if t is None else t.index_select(0, rows) for t in own)
        return self._replace(mask=mask, injection=injection)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also takes a single value per group: then it returns its bias.

    PyTorch refuses that for a batch of one image and not for more, but a model must take images
    of any size in any number.
    """

    def prepare(self) -> Held:
        return [self.weight, self.bias]

    def forward(self, x: Tensor, held: Held) -> Tensor:
        return torch.group_norm(x, self.num_groups, *held, self.eps)


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


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return conv2d(x, weight, conv.stride[0], conv.padding[0])


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

    def prepare(self, z: Tensor, x: Tensor | None = None) -> BlockTensors:
        """Compute the weights and draw the mask of one forward, for states like z.

        x is the injection, of the shape of z; None injects nothing.
        """
        for name, norm in self._norms.items():
            norm.reset(getattr(self, name))
        mask = self.drop.reset_mask(*z.shape, device=z.device, dtype=z.dtype)
        norms = [norm.prepare() for norm in (self.gn1, self.gn2, self.gn3)]
        return BlockTensors(self.conv1.weight, self.conv2.weight, *norms, mask, x)

    def forward(self, z: Tensor, held: BlockTensors) -> Tensor:
        """z (B, C, H, W)."""
        weight1, weight2, gn1, gn2, gn3, mask, x = held
        t = self.gn1(_convolve(self.conv1, z, weight1), gn1).relu_()  # (B, inner, H, W)
        t = _convolve(self.conv2, t, weight2)
        if mask is not None:
            t = t.mul_(mask)
        if x is not None:
            t = t.add_(x)
        return self.gn3(self.gn2(t, gn2).add_(z).relu_(), gn3)


class Branch(nn.Module):
    """The residual blocks of one resolution; the first takes the injection."""

    def __init__(self, n_blocks: int, *args, **options):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(*args, **options) for _ in range(n_blocks))

    def prepare(self, z: Tensor, x: Tensor | None = None) -> Held:
        return [block.prepare(z, None if n else x) for n, block in enumerate(self.blocks)]

    def forward(self, z: Tensor, held: Held) -> Tensor:
        for block, own in zip(self.blocks, held, strict=True):
            z = block(z, own)
        return z


class FuseFromLower(nn.Module):
    """From a lower resolution: conv1x1, GroupNorm. What comes after is ``doubled``."""

    def __init__(self, channels: int, out_channels: int, groups: int, affine: bool):
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, out_channels, 1, bias=False),
                gnorm=group_norm(groups, out_channels, affine),
            )
        )

    def prepare(self) -> Held:
        return [self.net.conv.weight, self.net.gnorm.prepare()]

    def forward(self, y: Tensor, held: Held) -> Tensor:
        """y (B, C, h, w) -> (B, C', h, w)."""
        weight, gnorm = held
        return self.net.gnorm(_convolve(self.net.conv, y, weight), gnorm)


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
            self.net.append(nn.Sequential(step))

    def prepare(self) -> Held:
        return [[step.conv.weight, step.gnorm.prepare()] for step in self.net]

    def forward(self, y: Tensor, held: Held) -> Tensor:
        """y (B, C, h, w) -> (B, C', h / 2^steps, w / 2^steps), rounded up."""
        for n, (step, (weight, gnorm)) in enumerate(zip(self.net, held, strict=True)):
            y = y.relu_() if n else y
            y = step.gnorm(_convolve(step.conv, y, weight), gnorm)
        return y


class PostFusion(nn.Module):
    """relu, conv1x1, GroupNorm."""

    def __init__(self, channels: int, groups: int, affine: bool, wnorm: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.gnorm = group_norm(groups, channels, affine)
        self._norm = _normed(self.conv) if wnorm else None

    def prepare(self) -> Held:
        """Compute the weight of one forward."""
        if self._norm is not None:
            self._norm.reset(self.conv)
        return [self.conv.weight, self.gnorm.prepare()]

    def forward(self, y: Tensor, held: Held) -> Tensor:
        """y (B, C, H, W), which is overwritten."""
        weight, gnorm = held
        return self.gnorm(_convolve(self.conv, y.relu_(), weight), gnorm)


def doubled(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest upsampling (B, C, h, w) -> (B, C, H, W) to ``size``, h = ceil(H / 2) and w alike.

    An odd height or width cuts the last row or column, so that pixel (i, j) of y still covers the
    pixels from (2 i, 2 j) on. On the CPU in float32 this takes about half the time of
    F.interpolate, forward and backward.
    """
    height, width = size
    y = torch.stack((y, y), dim=4).flatten(3)[..., :width]  # (B, C, h, W)
    y = torch.cat((y, y), dim=3).unflatten(3, (2, width)).flatten(2, 3)  # (B, C, 2 h, W)
    return y[:, :, :height]
