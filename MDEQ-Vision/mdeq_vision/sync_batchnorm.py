"""Batch norm with statistics over all processes, on any device.

PyTorch's own ``nn.SyncBatchNorm`` supports GPU tensors only. This one computes the same on CPUs
(gloo).
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lib.errors import InputError


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015, arXiv 1502.03167) over the batches of all processes.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance per channel
    over all pixels of all processes. The batches of the processes may differ in size, also be
    empty. The running statistics are updated as in one process with the whole batch. In eval mode,
    and with a single process, the layer behaves as ``nn.BatchNorm2d``. Its arguments and
    state-dict keys are those of ``nn.BatchNorm2d``.

    The gradient of x is the gradient of the sum of all processes' losses. The gradients of weight
    and bias are this process's own share, to be averaged by DistributedDataParallel. The forward
    and the backward pass communicate once each, so all processes must run the same layers in the
    same order. Double backward is not supported.

    Args:
        process_group: the processes that share statistics; None for all.

    Raises:
        InputError: in training, all processes together have fewer than two values per channel.
    """

    def __init__(self, *args, process_group: "dist.ProcessGroup | None" = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape and dtype; computed in float32 or higher precision."""
        distributed = dist.is_available() and dist.is_initialized()
        if not self.training or not distributed or dist.get_world_size(self.process_group) < 2:
            return super().forward(x)
        self._check_input_dim(x)
        count, mean, squares = _statistics(x.detach(), self.process_group)
        if count < 2:
            raise InputError(
                f"batch norm in training needs more than one value per channel, but all processes "
                f"together have {int(count)}: raise the batch size or the image size"
            )
        if self.track_running_stats:
            self._update_running(mean, squares / (count - 1))
        inv_std = (squares / count + self.eps).rsqrt()
        return _Normalise.apply(x, self.weight, self.bias, mean, inv_std, count, self.process_group)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        # momentum None: the mean over all batches so far
        factor = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.mul_(1 - factor).add_(new.to(running), alpha=factor)


def convert_sync_batchnorm(
    model: nn.Module, process_group: "dist.ProcessGroup | None" = None
) -> nn.Module:
    """Replace every batch norm of a model by one over all processes, in place.

    A model on a GPU gets PyTorch's ``nn.SyncBatchNorm``, any other model ``SyncBatchNorm2d``. So
    move the model to its device first. Parameters and buffers stay the same objects; training mode,
    momentum and state-dict keys are kept. ``process_group`` None means all processes.

    Returns:
        The model, or its replacement if the model itself is a batch norm.

    Raises:
        InputError: the model is not on a GPU and has a batch norm other than BatchNorm2d.
    """
    if any(tensor.is_cuda for tensor in [*model.parameters(), *model.buffers()]):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    # By module, so that a layer used in several places stays one layer.
    replaced = {
        module: _converted(name, module, process_group)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, (SyncBatchNorm2d, nn.SyncBatchNorm))
    }
    for parent in list(model.modules()):
        for name, child in list(
            parent._modules.items()
        ):  # not named_children(), which skips repeated modules
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)


@contextlib.contextmanager
def each_by_itself(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block, every batch norm of ``model`` uses its own process's batch only.

    Use this if every process has the whole batch. Statistics over all copies of the batch would
    give another unbiased variance than the batch itself.
    """
    norms = [m for m in model.modules() if isinstance(m, (SyncBatchNorm2d, nn.SyncBatchNorm))]
    for norm in norms:
        norm.forward = partial(_BatchNorm.forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _converted(name: str, norm: _BatchNorm, process_group) -> SyncBatchNorm2d:
    if not isinstance(norm, nn.BatchNorm2d):
        raise InputError(
            f"layer {name!r} is a {type(norm).__name__}, but only BatchNorm2d can be synchronised"
        )
    sync = SyncBatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        process_group=process_group,
        device="meta",  # its tensors are replaced below
    )
    sync.weight, sync.bias = norm.weight, norm.bias
    sync.running_mean, sync.running_var = norm.running_mean, norm.running_var
    sync.num_batches_tracked = norm.num_batches_tracked
    sync.training = norm.training
    return sync


def _statistics(x: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Count per channel, mean (C,), squared deviations (C,) of x (B, C, H, W) of all processes.

    Every process centres its own values, and the results are merged by the formula of Chan, Golub
    and LeVeque (1983): plain sums of squares would lose digits if the mean is large.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = x.new_tensor([x.numel() // x.shape[1]])
    mean = x.sum((0, 2, 3)) / count.clamp(min=1)
    squares = (x - _per_channel(mean)).square().sum((0, 2, 3))
    mine = torch.cat([count, mean, squares])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    # Summed in the same order in all processes, so that all get the same bits.
    counts, means, squares = torch.stack(everyone).split([1, *[x.shape[1]] * 2], dim=1)  # (P, ...)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return count, mean, (squares + counts * (means - mean).square()).sum(0)


class _Normalise(torch.autograd.Function):
    """(x - mean) * inv_std * weight + bias, where mean and inv_std depend on x of all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, inv_std, count, group):
        ctx.save_for_backward(x, weight, mean, inv_std, count)
        ctx.group = group
        scale = inv_std if weight is None else inv_std * weight
        y = (x - _per_channel(mean)) * _per_channel(scale)
        return (y if bias is None else y + _per_channel(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inv_std, count = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        x_hat = (x - _per_channel(mean)) * _per_channel(inv_std)
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * x_hat).sum((0, 2, 3))])  # (2, C)
        grad_bias, grad_weight = sums.clone()
        grad_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums, group=ctx.group)
            mean_grad, mean_product = map(_per_channel, sums / count)
            scale = inv_std if weight is None else inv_std * weight
            grad_x = (grad - mean_grad - x_hat * mean_product) * _per_channel(scale)
        # Autograd casts the gradients to the dtypes of the inputs.
        grad_weight = grad_weight if ctx.needs_input_grad[1] else None
        grad_bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]  # (C, 1, 1), broadcasts with (B, C, H, W)
