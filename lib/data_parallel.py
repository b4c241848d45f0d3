"""Data parallelism over several GPUs in one process."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, parallel_apply, replicate
from torch.nn.parallel.scatter_gather import gather

from lib.errors import InputError
from lib.solvers.precision import in_context, same_autocast


def shares(batch: int, n_devices: int, first: int = -1) -> list[int]:
    """Number of samples per device: ``first`` on device 0 (-1: even), the rest divided evenly.

    >>> shares(56, 4, 14), shares(10, 4, 1), shares(10, 3)
    ([14, 14, 14, 14], [1, 3, 3, 3], [4, 3, 3])
    """
    if n_devices == 1:
        return [batch]
    if first > batch:
        raise InputError(f"the first device's share {first} exceeds the batch of {batch}")
    given = [] if first < 0 else [first]
    others = n_devices - len(given)
    quotient, rest = divmod(batch - sum(given), others)
    return given + [quotient + (i < rest) for i in range(others)]


class BalancedDataParallel(DataParallel):
    """DataParallel with ``first`` samples on the first device, which also holds the outputs.

    Args:
        module: the model.
        first: number of samples on device 0; -1 splits the batch evenly.
        dim: batch dimension of all inputs, along which they are split.
        output_dims: batch dimension of each output in the model's list. None is for a mean over
            samples: its parts are averaged with the numbers of samples as weights.
        device_ids: numbers of the GPUs; None means all.
    """

    def __init__(
        self,
        module: nn.Module,
        first: int,
        dim: int,
        output_dims: Sequence[int | None],
        device_ids: Sequence[int] | None = None,
    ):
        super().__init__(module, device_ids=device_ids, dim=dim)
        self.first, self.output_dims = first, tuple(output_dims)

    def forward(self, *inputs, **kwargs):
        if len(self.device_ids) < 2:
            return self.module(*inputs, **kwargs)
        batch = inputs[0].shape[self.dim]
        parts = shares(batch, len(self.device_ids), self.first)
        devices = [d for d, size in zip(self.device_ids, parts, strict=True) if size]
        sizes = [size for size in parts if size]
        scattered = zip(*(self._split(value, devices, sizes) for value in inputs), strict=True)
        copies = [kwargs] * len(devices)
        outputs = parallel_apply(self._replicas(devices), list(scattered), copies, devices)
        return [
            self._merge(part, dim, sizes)
            for part, dim in zip(zip(*outputs, strict=True), self.output_dims, strict=True)
        ]

    def _replicas(self, devices: list[int]) -> list:
        """Copies of the module on ``devices``, as functions with the caller's autocast setting."""
        # replicate copies from the first device: include it even without samples (zero gradient).
        first, *others = self.device_ids
        wanted = [first, *(d for d in devices if d in others)]
        replicas = replicate(self.module, wanted, detach=not torch.is_grad_enabled())
        autocast = same_autocast(self.src_device_obj)
        # parallel_apply runs each replica in a thread, with autocast, but not the caller's dtype.
        return [in_context(autocast, replica) for replica in replicas[-len(devices) :]]

    def _merge(self, parts: Sequence[Tensor], dim: int | None, sizes: list[int]) -> Tensor:
        if dim is not None:
            return gather(parts, self.output_device, dim)
        pairs = zip(parts, sizes, strict=True)
        return reduce(torch.add, (p.to(self.output_device) * n for p, n in pairs)) / sum(sizes)

    def _split(self, value, devices: list[int], sizes: list[int]) -> list:
        if isinstance(value, Tensor):
            parts = torch.split(value, sizes, dim=self.dim)
            return [part.to(device) for part, device in zip(parts, devices, strict=True)]
        if isinstance(value, (list, tuple)) and value:
            return list(zip(*(self._split(item, devices, sizes) for item in value), strict=True))
        return [value] * len(devices)
