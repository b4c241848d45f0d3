"""The multiscale layer f: a residual block per resolution, then every-to-every fusion.

The state is a list z of n branches, z_i (B, C_i, H_i, W_i) with H_i = ceil(H / 2^i), W_i alike.
``prepare`` does what does not depend on z, once per forward, and returns f.
"""

from collections.abc import Callable

from torch import Tensor, nn
from yacs.config import CfgNode

from lib.errors import InputError
from mdeq_vision.blocks import Branch, FuseFromHigher, FuseFromLower, PostFusion
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
                    row.append(
                        FuseFromLower(channels[j], channels[i], 2 ** (j - i), groups, affine)
                    )
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

        Args:
            injection: x of branch 0, (B, C_0, H, W); the other branches have none.
            z0: a state of the sizes to come.
        """
        for branch, z in zip(self.branches, z0, strict=True):
            branch.reset(z)
        if len(z0) > 1:
            for layer in self.post_fuse_layers:
                layer.reset()
        injections = [injection, *[None] * (len(z0) - 1)]
        return lambda z: self(z, injections)

    def forward(self, z: list[Tensor], injections: list[Tensor | None]) -> list[Tensor]:
        """One application; ``prepare`` must have gone before."""
        inputs = zip(self.branches, z, injections, strict=True)
        outs = [branch(z_i, x) for branch, z_i, x in inputs]
        if len(outs) == 1:
            return outs
        sizes = [tuple(out.shape[-2:]) for out in outs]
        return [
            post(self._fuse(row, i, outs, sizes[i]))
            for i, (row, post) in enumerate(
                zip(self.fuse_layers, self.post_fuse_layers, strict=True)
            )
        ]

    @staticmethod
    def _fuse(row: nn.ModuleList, i: int, outs: list[Tensor], size: tuple[int, int]) -> Tensor:
        """y_i = sum_j T_ij(out_j)."""
        y = outs[i]
        for j, transform in enumerate(row):
            if j != i:
                y = y + transform(outs[j], size)
        return y
