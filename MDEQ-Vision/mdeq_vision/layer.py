"""The multiscale layer f: a residual block per resolution, then every-to-every fusion.

The state is a list z of n branches, z_i (B, C_i, H_i, W_i) with H_i = ceil(H / 2^i), W_i alike.
``prepare`` does what does not depend on z, once per forward, and returns f.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from lib.compiling import compiled
from lib.errors import InputError, naming
from mdeq_vision.blocks import (
    BlockTensors,
    Branch,
    FuseFromHigher,
    FuseFromLower,
    Held,
    PostFusion,
    doubled,
)
from mdeq_vision.stage import check_integer, full_stage


def branch_sizes(height: int, width: int, n: int) -> list[tuple[int, int]]:
    """Sizes of n branches; an odd side is rounded up, as convolutions of stride 2 do.

    >>> branch_sizes(32, 25, 3)
    [(32, 25), (16, 13), (8, 7)]
    """
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(n)]


class MultiscaleLayer(nn.Module):
    """f of arXiv 2006.08656, sections 3.2 and 4, from MODEL of the configuration."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        model, stage = cfg.MODEL, full_stage(cfg)
        self.compile_f = cfg.COMPILE
        self.channels = channels = list(stage.NUM_CHANNELS)
        n, groups, wnorm = stage.NUM_BRANCHES, model.NUM_GROUPS, model.WNORM
        check_integer("MODEL.NUM_GROUPS", groups, 1)
        if int(model.EXPANSION_FACTOR * min(channels)) < 1:
            raise InputError(
                f"MODEL.EXPANSION_FACTOR is {model.EXPANSION_FACTOR}, which leaves no channels of "
                f"{min(channels)}"
            )
        if n > 1 and groups < 2:
            raise InputError(
                f"MODEL.NUM_GROUPS is {groups}, but must be at least 2 with several branches: "
                "after the fusion there are half as many"
            )
        self.branches = nn.ModuleList(
            Branch(
                blocks,
                width,
                int(model.EXPANSION_FACTOR * width),
                kernels,
                groups=groups,
                affine=model.BLOCK_GN_AFFINE,
                dropout=model.DROPOUT,
                wnorm=wnorm,
            )
            for width, blocks, kernels in zip(
                channels, stage.NUM_BLOCKS, stage.BIG_KERNELS, strict=True
            )
        )
        if n == 1:  # nothing to fuse: the block alone
            return
        affine = model.FUSE_GN_AFFINE
        self.fuse_layers = nn.ModuleList()
        for i in range(n):
            row = nn.ModuleList()
            for j in range(n):
                if j > i:
                    row.append(FuseFromLower(channels[j], channels[i], groups, affine))
                elif j < i:
                    row.append(FuseFromHigher(channels[j], channels[i], i - j, groups, affine))
                else:
                    row.append(None)  # the identity; it keeps the published names
            self.fuse_layers.append(row)
        self.post_fuse_layers = nn.ModuleList(
            PostFusion(width, groups // 2, model.POST_GN_AFFINE, wnorm) for width in channels
        )

    def prepare(
        self, injection: Tensor, z0: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """f as a function of z alone; draws the dropout masks it will use throughout.

        Under autocast f computes in its number format, with weights that are cast here, once; and
        in full precision wherever it is called with autocast off. Its result has the dtype of z.

        With COMPILE, f is compiled where autograd is off: in all evaluations of a solver. Where it
        is on, the backward pass of compiled code would compute the gradients of the weights in
        every product with the Jacobian, and it has no second derivatives.

        ``f.select(rows)`` is the same map for some samples alone, with a ``select`` of its own:
        f.select(rows) of the z_i[rows] gives the rows of f(z) to rounding, for rows (n,) int64 on
        f's device. Its first evaluation in a number format gathers what belongs to single samples;
        all else it shares with f.

        Args:
            injection: x of branch 0, (B, C_0, H, W); the other branches have none.
            z0: a state of the sizes to come.
        """
        n, kind = len(z0), injection.device.type
        injections = [injection, *[None] * (n - 1)]
        held = [[b.prepare(*own) for b, *own in zip(self.branches, z0, injections, strict=True)]]
        if n > 1:
            held += [
                [[t if t is None else t.prepare() for t in row] for row in self.fuse_layers],
                [post.prepare() for post in self.post_fuse_layers],
            ]
        whole, dtype = {None: held}, _autocast_dtype(kind)
        if dtype is not None:
            whole[dtype] = _cast(held, dtype)
        return self._map(whole, dtype)

    def _map(
        self,
        whole: dict[torch.dtype | None, Held],
        low: torch.dtype | None,
        rows: Tensor | None = None,
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """f for the samples ``rows`` (all if None), from what is held for the whole batch.

        Args:
            whole: in full precision, at None, and in the number format ``low`` of autocast.
        """

        @cache
        def held(dtype: torch.dtype | None) -> Held:
            with torch.enable_grad():  # what has a graph keeps it, also in a solver
                return whole[dtype] if rows is None else _select(whole[dtype], rows)

        def f(z: list[Tensor]) -> list[Tensor]:
            kind = z[0].device.type
            compiles = self.compile_f and not torch.is_grad_enabled()
            apply = partial(_compiled(kind), self) if compiles else self
            if low is None or not torch.is_autocast_enabled(kind):
                return apply(held(None), z)
            # All is in that format already; autocast would only look for what to cast.
            with torch.autocast(kind, enabled=False):
                outs = apply(held(low), [z_i.to(low) for z_i in z])
                return [out.to(z_i.dtype) for out, z_i in zip(outs, z, strict=True)]

        def select(some: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
            # From the whole batch again: a selection of a selection keeps no tensors of the latter.
            return self._map(whole, low, some if rows is None else rows[some])

        f.select = select
        return f

    def forward(self, held: Held, z: list[Tensor]) -> list[Tensor]:
        """One application, with what ``prepare`` collected."""
        branches, *rest = held
        outs = [branch(*own) for branch, *own in zip(self.branches, z, branches, strict=True)]
        if len(outs) == 1:
            return outs
        fuse, posts = rest
        return [
            post(self._fuse(i, outs, fuse[i]), own)
            for i, (post, own) in enumerate(zip(self.post_fuse_layers, posts, strict=True))
        ]

    def _fuse(self, i: int, outs: list[Tensor], held: Held) -> Tensor:
        """y_i = sum_j T_ij(out_j).

        To upsample by 2^k is to double k times, so the sum is taken on the way up: each
        resolution is doubled once, together with all that lies below it.
        """
        row, y = self.fuse_layers[i], None
        for j in range(len(outs) - 1, i, -1):
            t = row[j](outs[j], held[j])
            y = doubled(t if y is None else t.add_(y), outs[j - 1].shape[-2:])
        y = outs[i] if y is None else y.add_(outs[i])
        for j in range(i):
            y = row[j](outs[j], held[j]).add_(y)
        return y


def _cast(held, dtype: torch.dtype):
    """The same in another number format, with its graph."""
    if isinstance(held, list):
        return [_cast(part, dtype) for part in held]
    if isinstance(held, BlockTensors):
        return BlockTensors(*_cast([*held], dtype))
    return None if held is None else held.to(dtype)


def _select(held, rows: Tensor):
    """The same for some of the samples; what samples share is not copied."""
    if isinstance(held, list):
        return [_select(part, rows) for part in held]
    return held.select(rows) if isinstance(held, BlockTensors) else held


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """The number format of autocast on a kind of device; None where it is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


@cache
def _compiled(kind: str) -> Callable:
    """One application of any layer, compiled; it is a free function, so that models stay copyable.

    Raises:
        InputError: torch.compile does not work here.
    """
    with naming("COMPILE"):
        return compiled(MultiscaleLayer.forward, kind)
