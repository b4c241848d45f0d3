"""The pieces of the multiscale layer f: residual block, fusion, post-fusion.

GroupNorm has ``groups`` groups. No convolution here has a bias. Names and order follow the
published state dicts.

Each piece has two methods. ``prepare`` runs once per forward of the model, not once per
application of f. It returns the tensors that ``forward`` needs beside its input: weights, a mask,
an injection. The caller may cast these tensors, or select samples from them, before it passes
them to ``forward`` as ``held``. ``forward`` overwrites tensors that nothing else needs.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.layer_utils import conv3x3, conv5x5
from lib.optimization import VariationalHidDropout2d, weight_norm
from mdeq_vision.convolution import conv2d

Held = list[Any]  # what ``prepare`` returns: tensors (or None), BlockTensors, or lists of these


class BlockTensors(NamedTuple):
    """The prepared tensors of a residual block. Only ``mask`` and ``injection`` have an entry per
    sample, here and among all prepared tensors."""

    weight1: Tensor  # (inner, C, k, k)
    weight2: Tensor  # (C, inner, k, k)
    gn1: Held
    gn2: Held
    gn3: Held
    mask: Tensor | None  # (B, C, 1, 1)
    injection: Tensor | None  # (B, C, H, W)

    def select(self, rows: Tensor) -> "BlockTensors":
        """Select the samples ``rows`` of mask and injection; share all other tensors."""
        own = self.mask, self.injection
        mask, injection = (None if t is None else t.index_select(0, rows) for t in own)
        return self._replace(mask=mask, injection=injection)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also accepts a single value per group, as of one small image."""

    def prepare(self) -> Held:
        return [self.weight, self.bias]

    def forward(self, x: Tensor, held: Held) -> Tensor:
        return torch.group_norm(x, self.num_groups, *held, self.eps)


def group_norm(groups: int, channels: int, affine: bool) -> GroupNorm:
    """Build a GroupNorm.

    Raises:
        InputError: ``groups`` does not divide ``channels``.
    """
    if channels % groups:
        raise InputError(
            f"{channels} channels do not split into {groups} groups: choose MODEL.NUM_GROUPS so "
            "that it divides NUM_CHANNELS and EXPANSION_FACTOR * NUM_CHANNELS"
        )
    return GroupNorm(groups, channels, affine=affine)


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return conv2d(x, weight, conv.stride[0], conv.padding[0])


class ResidualBlock(nn.Module):
    """t = relu(GN1(conv1(z))); t = drop(conv2(t)) + x; out = GN3(relu(GN2(t) + z)).

    Args:
        channels: C of the branch.
        inner: channels between the convolutions.
        big_kernels: 0, 1 or 2; the first ``big_kernels`` convolutions are 5x5 instead of 3x3.
        groups, affine: of each GroupNorm.
        dropout: dropout probability; one mask value per sample and channel.
        wnorm: whether the convolutions are weight-normalised.
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
        if wnorm:
            weight_norm(self.conv1, ["weight"])
            weight_norm(self.conv2, ["weight"])

    def prepare(self, z: Tensor, x: Tensor | None = None) -> BlockTensors:
        """Compute the weights and draw the mask for one forward of the model.

        Args:
            z: a state (B, C, H, W); only its shape, dtype and device count.
            x: the injection, of the shape of z; None injects nothing.
        """
        mask = self.drop.reset_mask(*z.shape, device=z.device, dtype=z.dtype)
        norms = [norm.prepare() for norm in (self.gn1, self.gn2, self.gn3)]
        return BlockTensors(self.conv1.weight, self.conv2.weight, *norms, mask, x)

    def forward(self, z: Tensor, held: BlockTensors) -> Tensor:
        """z (B, C, H, W) -> (B, C, H, W)."""
        weight1, weight2, gn1, gn2, gn3, mask, x = held
        t = self.gn1(_convolve(self.conv1, z, weight1), gn1).relu_()  # (B, inner, H, W)
        t = _convolve(self.conv2, t, weight2)
        if mask is not None:
            t = t.mul_(mask)
        if x is not None:
            t = t.add_(x)
        return self.gn3(self.gn2(t, gn2).add_(z).relu_(), gn3)


class Branch(nn.Module):
    """The residual blocks of one resolution; the first block takes the injection."""

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
    """Fusion from a lower resolution: conv1x1, GroupNorm. The caller upsamples by ``doubled``."""

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
    """Fusion from a higher resolution: ``steps`` times conv3x3 with stride 2, GroupNorm, relu.

    Only the last step changes the number of channels; the last step has no relu.
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
        if wnorm:
            weight_norm(self.conv, ["weight"])

    def prepare(self) -> Held:
        """Compute the weight for one forward of the model."""
        return [self.conv.weight, self.gnorm.prepare()]

    def forward(self, y: Tensor, held: Held) -> Tensor:
        """y (B, C, H, W) -> (B, C, H, W); y is overwritten."""
        weight, gnorm = held
        return self.gnorm(_convolve(self.conv, y.relu_(), weight), gnorm)


def doubled(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample y (B, C, h, w) to ``size`` = (H, W) by nearest neighbour.

    h = ceil(H / 2) and w = ceil(W / 2). If H or W is odd, the last row or column is cut, so that
    pixel (i, j) of y always covers the pixels from (2 i, 2 j) on. On the CPU in float32 this takes
    about half the time of F.interpolate, forward and backward.
    """
    height, width = size
    y = torch.stack((y, y), dim=4).flatten(3)[..., :width]  # (B, C, h, W)
    y = torch.cat((y, y), dim=3).unflatten(3, (2, width)).flatten(2, 3)  # (B, C, 2 h, W)
    return y[:, :, :height]
