"""The multiscale layer f: a residual block per resolution, then every-to-every fusion.

The state is a list z of n branches: z_i is (B, C_i, H_i, W_i), with H_i = ceil(H / 2^i) and
W_i = ceil(W / 2^i). ``prepare`` runs once per forward: it computes all that does not depend on z,
and returns f.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from lib.errors import InputError, naming
from lib.graphs import compiled
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
    """The sizes of n branches. An odd side is rounded up, as a convolution of stride 2 does.

    >>> branch_sizes(32, 25, 3)
    [(32, 25), (16, 13), (8, 7)]
    """
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(n)]


class MultiscaleLayer(nn.Module):
    """The layer f of arXiv 2006.08656, sections 3.2 and 4, built from the section MODEL."""

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
        if n == 1:  # nothing to fuse
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
                    row.append(None)  # identity; keeps the indices in the published names
            self.fuse_layers.append(row)
        self.post_fuse_layers = nn.ModuleList(
            PostFusion(width, groups // 2, model.POST_GN_AFFINE, wnorm) for width in channels
        )

    def prepare(
        self, injection: Tensor, z0: list[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Draw the dropout masks and return f as a function of z alone.

        All calls of f use the same masks. Under autocast, f computes in autocast's dtype, with
        weights that are cast here once. Called with autocast off, f computes in full precision.
        The result has the dtype of z in both cases.

        With COMPILE, f is compiled for calls without autograd, as in all evaluations of a solver.
        Calls with autograd stay eager: the backward of compiled code would compute the weights'
        gradients in every vector-Jacobian product, and has no second derivatives.

        f has ``select`` (:mod:`lib.solvers.maps`); the first call of a selection in a dtype copies
        the tensors with an entry per sample (masks and injection), and shares all others with f.

        Args:
            injection: x of branch 0, (B, C_0, H, W); the other branches have no injection.
            z0: a state with the sizes of all states to come.
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
        return self._on(whole)

    def _on(self, whole: dict[torch.dtype | None, Held]) -> Callable[[list[Tensor]], list[Tensor]]:
        """f with these tensors, in full precision and perhaps in autocast's dtype."""
        f = self._map(whole, next((dtype for dtype in whole if dtype is not None), None))
        # A replay would pass the hooks of users by; DataParallel makes a new layer at each call.
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        if not hooked and not getattr(self, "_is_replica", False):
            f.source = lambda: (self._on, whole)
        return f

    def _map(
        self,
        whole: dict[torch.dtype | None, Held],
        low: torch.dtype | None,
        rows: Tensor | None = None,
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return f for the samples ``rows``, (n,) int64; None takes all.

        ``whole`` has the prepared tensors of the whole batch: in full precision under the key None,
        and under autocast also in its dtype ``low``.
        """

        @cache
        def held(dtype: torch.dtype | None) -> Held:
            with torch.enable_grad():  # a solver may call first: the graph must survive
                return whole[dtype] if rows is None else _select(whole[dtype], rows)

        def f(z: list[Tensor]) -> list[Tensor]:
            kind = z[0].device.type
            compiles = self.compile_f and not torch.is_grad_enabled()
            apply = partial(_compiled(kind), self) if compiles else self
            if low is None or not torch.is_autocast_enabled(kind):
                return apply(held(None), z)
            # All tensors have this dtype already; autocast would only cost time.
            with torch.autocast(kind, enabled=False):
                outs = apply(held(low), [z_i.to(low) for z_i in z])
                return [out.to(z_i.dtype) for out, z_i in zip(outs, z, strict=True)]

        def select(some: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
            # Select from the whole batch, so that the result keeps no tensors of this f alive.
            return self._map(whole, low, some if rows is None else rows[some])

        f.select = select
        return f

    def forward(self, held: Held, z: list[Tensor]) -> list[Tensor]:
        """Apply f once, with the tensors that ``prepare`` collected."""
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
        """Compute y_i = sum_j T_ij(out_j).

        Upsampling by 2^k is k doublings. So the loop adds the lower resolutions on the way up:
        each sum is doubled once, instead of each term k times.
        """
        row, y = self.fuse_layers[i], None
        for j in range(len(outs) - 1, i, -1):
            t = row[j](outs[j], held[j])
            y = doubled(t if y is None else t.add_(y), outs[j - 1].shape[-2:])
        # Not in place: y is a view, whose change in place autograd would record with many copies.
        y = outs[i] if y is None else y + outs[i]
        for j in range(i):
            y = row[j](outs[j], held[j]).add_(y)
        return y


def _cast(held, dtype: torch.dtype):
    """Cast prepared tensors to ``dtype``; autograd records the cast."""
    if isinstance(held, list):
        return [_cast(part, dtype) for part in held]
    if isinstance(held, BlockTensors):
        return BlockTensors(*_cast([*held], dtype))
    return None if held is None else held.to(dtype)


def _select(held, rows: Tensor):
    """Select samples of prepared tensors; tensors that all samples share are not copied."""
    if isinstance(held, list):
        return [_select(part, rows) for part in held]
    return held.select(rows) if isinstance(held, BlockTensors) else held


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None if autocast is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


@cache
def _compiled(kind: str) -> Callable:
    """``MultiscaleLayer.forward``, compiled. Not kept in the layer: models stay copyable."""
    with naming("COMPILE"):
        return compiled(MultiscaleLayer.forward, kind)
