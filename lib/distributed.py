"""Several processes under torchrun, or several GPUs in one process."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, parallel_apply, replicate
from torch.nn.parallel.scatter_gather import gather

from lib.errors import InputError


@dataclass(frozen=True)
class Processes:
    """Which of the processes of a run this is; without torchrun, the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its machine: the number of its GPU

    @classmethod
    def start(cls) -> "Processes":
        """Join the other processes that torchrun started, over NCCL with GPUs, else over gloo."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: "
                "start several processes with torchrun, or unset WORLD_SIZE"
            )
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The ``value`` of every process, by rank; any plain containers and tensors."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def stop(self) -> None:
        """Leave the others."""
        if self.world_size > 1:
            dist.destroy_process_group()


def shares(batch: int, n_devices: int, first: int = -1) -> list[int]:
    """Sizes of each device's part of a batch: ``first`` on device 0 (-1: even), the rest even.

    >>> shares(56, 4, 14), shares(10, 4, 1), shares(10, 3)
    ([14, 14, 14, 14], [1, 3, 3, 3], [4, 3, 3])
    """
    if n_devices == 1:
        return [batch]
    if first > batch:
        raise InputError(f"the first device's share {first} exceeds the batch of {batch}")
    if first < 0:
        quotient, rest = divmod(batch, n_devices)
        return [quotient + (i < rest) for i in range(n_devices)]
    quotient, rest = divmod(batch - first, n_devices - 1)
    return [first, *(quotient + (i < rest) for i in range(n_devices - 1))]


class BalancedDataParallel(DataParallel):
    """DataParallel with ``first`` samples on the first device, which also holds the outputs.

    Args:
        module: the model; its tensor arguments are split along ``dim``.
        first: samples on device 0; -1 shares evenly, 0 leaves it to the outputs alone.
        dim: batch dimension of all inputs.
        output_dims: batch dimension of each output of the model's list; None for an output that
            is a mean over samples, which is averaged with the shares as weights, so that it is
            the mean over the whole batch.
        device_ids: numbers of the GPUs; all if None.
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
        replicas = replicate(self.module, devices, detach=not torch.is_grad_enabled())
        outputs = parallel_apply(replicas, list(scattered), [kwargs] * len(devices), devices)
        return [
            self._merge(part, dim, sizes)
            for part, dim in zip(zip(*outputs, strict=True), self.output_dims, strict=True)
        ]

    def _merge(self, parts: Sequence[Tensor], dim: int | None, sizes: list[int]) -> Tensor:
        if dim is not None:
            return gather(parts, self.output_device, dim)
        weighted = [
            part.to(self.output_device) * size for part, size in zip(parts, sizes, strict=True)
        ]
        return sum(weighted) / sum(sizes)

    def _split(self, value, devices: list[int], sizes: list[int]) -> list:
        if isinstance(value, Tensor):
            parts = torch.split(value, sizes, dim=self.dim)
            return [part.to(device) for part, device in zip(parts, devices, strict=True)]
        if isinstance(value, (list, tuple)) and value:
            return list(zip(*(self._split(item, devices, sizes) for item in value), strict=True))
        return [value] * len(devices)
