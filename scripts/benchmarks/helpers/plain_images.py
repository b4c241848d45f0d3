"""MDEQ as first written: the state is packed and unpacked around every evaluation of f, and each
convolution, norm and sum of the multiscale layer is an operation of its own.

Only the normalised weights and the dropout masks are made once per forward. Parameters, random
draws and results are those of :mod:`mdeq_vision.model`, whose stem and heads are used as they are:
they run once per step.
"""

from collections.abc import Callable
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from lib.layer_utils import list2vec, vec2list
from mdeq_vision.layer import branch_sizes
from mdeq_vision.model import JAC_VECS, MDEQClsNet, MDEQSegNet


class _PlainForward:
    """Mixin with the plain forward, for training at equilibrium."""

    def forward(
        self,
        x: Tensor,
        train_step: int = -1,
        compute_jac_loss: bool = True,
        f_thres: int | None = None,
        b_thres: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`mdeq_vision.model.MDEQNet`."""
        injection = self.downsample(x)
        injection = injection if self.stage0 is None else self.stage0(injection)
        sizes = branch_sizes(*injection.shape[2:], len(self.channels))
        shapes = [(c, *size) for c, size in zip(self.channels, sizes, strict=True)]
        f = plain_layer(self.fullstage, injection, shapes)
        found = self.deq(
            lambda z: list2vec(f(vec2list(z, shapes))),
            injection.new_zeros(len(x), sum(map(prod, shapes)), 1),
            f_thres=self.f_thres if f_thres is None else f_thres,
            b_thres=self.b_thres if b_thres is None else b_thres,
            training=self.training,
            jac_vecs=JAC_VECS * (compute_jac_loss and self.training),
        )
        output = self.head(vec2list(found.z, shapes))
        return output, found.jac_loss.view(1, 1), found.sradius


class PlainClsNet(_PlainForward, MDEQClsNet):
    """Classification."""


class PlainSegNet(_PlainForward, MDEQSegNet):
    """Segmentation."""


def plain_layer(
    layer, injection: Tensor, shapes: list[tuple[int, int, int]]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """f as a function of the list of branches (B, C_i, H_i, W_i).

    Args:
        layer: the model's ``fullstage``, whose parameters are used and whose masks are drawn.
        injection: x of branch 0.
        shapes: (C, H, W) of each branch.
    """
    # Weight normalisation once per forward: a module's weight is computed where it is read.
    weights = {id(m): m.weight for m in layer.modules() if isinstance(m, nn.Conv2d)}
    for branch, shape in zip(layer.branches, shapes, strict=True):
        for block in branch.blocks:
            block.drop.reset_mask(
                len(injection), *shape, device=injection.device, dtype=injection.dtype
            )

    def conv(module: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, weights[id(module)], None, module.stride, module.padding)

    def residual_block(block, z: Tensor, x: Tensor | None) -> Tensor:
        t = F.relu(_norm(block.gn1, conv(block.conv1, z)))
        t = block.drop(conv(block.conv2, t))
        t = _norm(block.gn2, t if x is None else t + x)
        return _norm(block.gn3, F.relu(t + z))

    def fuse(transform, y: Tensor, i: int, j: int) -> Tensor:
        """T_ij of the branch j."""
        if j > i:
            y = _norm(transform.net.gnorm, conv(transform.net.conv, y))
            y = F.interpolate(y, scale_factor=2 ** (j - i), mode="nearest")
            return y[..., : shapes[i][1], : shapes[i][2]]
        for k, step in enumerate(transform.net):
            y = _norm(step.gnorm, conv(step.conv, y))
            y = F.relu(y) if k < i - j - 1 else y
        return y

    def f(z: list[Tensor]) -> list[Tensor]:
        outs = []
        for i, (branch, out) in enumerate(zip(layer.branches, z, strict=True)):
            for k, block in enumerate(branch.blocks):
                out = residual_block(block, out, injection if i == k == 0 else None)
            outs.append(out)
        if len(outs) == 1:
            return outs
        new = []
        for i, post in enumerate(layer.post_fuse_layers):
            y = outs[i]
            for j, transform in enumerate(layer.fuse_layers[i]):
                if j != i:
                    y = y + fuse(transform, outs[j], i, j)
            new.append(_norm(post.gnorm, conv(post.conv, F.relu(y))))
        return new

    return f


def _norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
