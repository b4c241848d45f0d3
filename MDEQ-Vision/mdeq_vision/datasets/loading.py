"""Batches in a reproducible order, with reproducible augmentation.

The content of a batch depends only on the seed, the epoch and the batch's number. It does not
depend on the number of worker processes or on the batches loaded before. So a run that resumes in
the middle of an epoch sees the same batches as an uninterrupted run.
"""

import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lib.errors import InputError
from lib.runs.processes import Processes


def n_batches(n: int, batch_size: int, *, drop_last: bool, percent: float = 1.0) -> int:
    """Number of batches in an epoch over n samples: the fraction ``percent``, but at least one.

    Raises:
        InputError: there is no batch at all, or an argument is out of range.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: it must be at least 1")
    if not 0 < percent <= 1:
        raise InputError(f"PERCENT {percent}: it must be above 0 and at most 1")
    if n < 1:
        raise InputError("the data set is empty")
    if drop_last and n < batch_size:
        raise InputError(
            f"the data set has {n} samples, fewer than one batch of {batch_size}: lower the batch "
            "size"
        )
    batches = n // batch_size if drop_last else -(-n // batch_size)
    return max(1, int(percent * batches))


class Loader:
    """The batches of one epoch from batch ``start`` on; every iteration gives the same."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, _Refused):
                raise InputError(batch.message)
            yield batch


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    shuffle: bool,
    drop_last: bool,
    percent: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    nobody_idle: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Return the loader of an epoch for one rank.

    With ``shuffle``, the order of the epoch is a permutation drawn from (seed, epoch). Batch k has
    the samples k * batch_size to (k + 1) * batch_size - 1 of this order. While sample i is
    loaded, torch's global generator is seeded by (seed, epoch, i); afterwards its state is
    restored.

    Args:
        batch_size: samples over all ranks together. Each rank gets a contiguous share; the first
            ranks get one sample more if the shares are uneven.
        start: number of the first batch, to continue in the middle of an epoch.
        drop_last: leave out a last batch that is not full.
        percent: load only this fraction of the epoch's batches, at least one.
        nobody_idle: decides about a last batch with fewer samples than ranks. True: every rank
            gets the whole batch, so means over ranks stay right. False: ranks without a sample do
            not get this batch.
        workers: loading processes; 0 loads in this process.

    Raises:
        InputError: an argument is out of range, or there is no batch at all. While iterating:
            the data set raised an InputError, in this process or in a worker.
    """
    count = n_batches(len(dataset), batch_size, drop_last=drop_last, percent=percent)
    if not 0 <= start <= count:
        raise InputError(f"cannot start at batch {start}: the epoch has {count} batches")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is not below the number of processes, {world_size}")
    if batch_size < world_size:
        raise InputError(
            f"a batch of {batch_size} cannot be shared by {world_size} processes: raise the batch "
            "size"
        )
    if shuffle:
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(len(dataset), generator=generator).tolist()
    else:
        order = list(range(len(dataset)))
    batches = (order[k * batch_size : (k + 1) * batch_size] for k in range(start, count))
    part = Processes(rank, world_size).part
    shares = (
        batch if nobody_idle and len(batch) < world_size else batch[part(len(batch))]
        for batch in batches
    )
    return Loader(
        DataLoader(
            _SeededDataset(dataset, seed),
            batch_sampler=[[(epoch, index) for index in share] for share in shares if share],
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            # Without a generator, each iterator would draw from the global one.
            generator=torch.Generator().manual_seed(0),
        )
    )


def on_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Yield the same batches on ``device``.

    The next batch is copied to a GPU on a separate stream while the present batch is in use. From
    pinned memory, copy and computation overlap.
    """
    if device.type != "cuda":
        for batch in batches:
            yield [part.to(device) for part in batch]
        return
    copies = torch.cuda.Stream(device)
    present = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = [part.to(device, non_blocking=True) for part in batch], copies.record_event()
        if present is not None:
            yield _arrived(*present)
        present = coming
    if present is not None:
        yield _arrived(*present)


def _arrived(batch: list[Tensor], copied: torch.cuda.Event) -> list[Tensor]:
    """Make the current stream wait for the copy; keep the memory until that stream is done."""
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(copied)
    for part in batch:
        part.record_stream(stream)
    return batch


def _outlive_signals(worker: int) -> None:
    """Let a worker ignore signals to the process group, and end with the trainer.

    At a signal to the whole group, the trainer finishes its step and still needs its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    """End this process at a SIGTERM from the trainer, which sends one when an error ends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _mix(*numbers: int) -> int:
    """Hash several numbers to a 64-bit seed."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class _Refused:
    """An InputError as data: DataLoader would wrap an error of a worker in a traceback."""

    message: str


class _SeededDataset(Dataset):
    """A data set indexed by (epoch, index); each sample has its own random numbers."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the GPUs too.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
            try:
                return self.dataset[index]
            except InputError as error:
                return _Refused(str(error))


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, _Refused):
            return sample
    shapes = {tuple(part.shape for part in sample if torch.is_tensor(part)) for sample in samples}
    if len(shapes) > 1:
        sizes = sorted({f"{image[-1]}x{image[-2]}" for image, *_ in shapes})
        return _Refused(
            f"a batch has images of different sizes ({', '.join(sizes)}): set the batch size to 1"
        )
    return default_collate(samples)
