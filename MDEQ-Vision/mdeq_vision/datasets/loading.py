"""Batches in a reproducible order, with reproducible augmentation.

What a batch holds depends on the seed, the epoch and its number alone: not on the number of
worker processes, nor on the batches loaded before it. So a run that resumes in the middle of an
epoch sees what the uninterrupted run saw.
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

from lib.distributed import Processes
from lib.errors import InputError


def n_batches(n: int, batch_size: int, *, drop_last: bool, percent: float = 1.0) -> int:
    """Batches in an epoch over n samples; with ``percent`` < 1 only that share of them, or one.

    Raises:
        InputError: no batch at all, or an argument out of range.
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
    """The batches of one epoch from batch ``start`` on. Iterating again gives them again.

    ``len()`` is the number of batches that it yields.
    """

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
    """The batches of an epoch.

    With ``shuffle``, the order of the epoch is a permutation drawn from (seed, epoch). Batch k is
    the samples k * batch_size to (k + 1) * batch_size of it. Sample i is loaded with torch's
    global generator seeded by (seed, epoch, i); outside, that generator is left as it was.

    Args:
        batch_size: over all ranks together. Each rank gets a contiguous share; what cannot be
            shared evenly goes to the first ranks.
        start: number of the first batch, to go on in the middle of an epoch.
        drop_last: leave out a last batch that is not full.
        nobody_idle: what becomes of a last batch with fewer samples than there are ranks: each
            rank gets all of it, which leaves means over the ranks as they are (True); or the ranks
            without a sample do not get that batch (False).
        percent: load only this share of the epoch's batches, at least one.
        workers: processes that load; 0 loads in this one.

    Raises:
        InputError: an argument out of range, no batch at all, or (while iterating) what the data
            set itself raises, also in a worker.
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
            # Otherwise each iterator draws a number from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
    )


def on_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """The same batches on ``device``.

    A GPU is given the next batch while it computes on the present one: from pinned memory the
    copy runs beside the computation, on a stream of its own.
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
    """Let the computation wait for the copy, and the memory for the computation."""
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(copied)
    for part in batch:
        part.record_stream(stream)
    return batch


def _outlive_signals(worker: int) -> None:
    """Terminals and clusters signal a whole group of processes. The trainer finishes its step then,
    and needs its workers to; they end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    """End this process when the trainer's asks for it, as it does when an error ends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _mix(*numbers: int) -> int:
    """A 64-bit seed out of several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class _Refused:
    """Carries an InputError out of a worker, where DataLoader would wrap it in a traceback."""

    message: str


class _SeededDataset(Dataset):
    """Sample (epoch, index) of a data set, with random numbers of its own."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reseed the GPUs too.
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
