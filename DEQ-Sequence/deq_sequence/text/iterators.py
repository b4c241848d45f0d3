"""Batches of consecutive tokens for language modelling."""

import random
from collections.abc import Iterator

import torch

from lib.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor, int]

# Lengths of iterate_varlen, distributed as in Transformer-XL (Dai et al. 2019, arXiv 1901.02860).
FULL_LENGTH_PROBABILITY = 0.95
LENGTH_STD = 5
MIN_LENGTH = 5
MAX_EXTRA_LENGTH = 3 * LENGTH_STD


class LMOrderedIterator:
    """Cuts a long text into ``bsz`` parallel streams and yields consecutive batches of them.

    The text is trimmed to a multiple of ``bsz``. Column b of every batch continues column b of
    the previous batch, as a model with memory needs. Row i is predicted from the rows before it:
    targets are the data shifted by one.

    Each batch is ``(data, target, seq_len)``: LongTensors of shape ``(ext + seq_len, bsz)`` and
    ``(seq_len, bsz)``. ``ext`` is the number of extra earlier positions at the beginning of the
    data: ``ext_len``, or fewer near the beginning of the text. Both tensors are views of one
    tensor on ``device``; do not write to them.

    Args:
        data: 1-d LongTensor of token ids, in the order of the text.
        bsz: number of parallel streams.
        bptt: positions per batch; the last batch of a pass may be shorter.
        device: device that holds the whole text.
        ext_len: number of earlier positions to put before the data of a batch; None means 0.
        streams: the slice of the ``bsz`` streams to keep, for one of several processes; None keeps
            all.

    Attributes:
        data: LongTensor (rows, streams); each column is one contiguous part of the text.
        rows: length of each stream; ``rows - 1`` positions can be predicted.

    Raises:
        InputError: ``bsz`` or ``bptt`` is below 1, ``ext_len`` is below 0, or the text has fewer
            than two rows.
    """

    def __init__(
        self,
        data: torch.Tensor,
        bsz: int,
        bptt: int,
        device: str | torch.device = "cpu",
        ext_len: int | None = None,
        streams: slice | None = None,
    ):
        ext_len = ext_len or 0
        for name, value, least in (("bsz", bsz, 1), ("bptt", bptt, 1), ("ext_len", ext_len, 0)):
            if value < least:
                raise InputError(f"{name} is {value}: give {least} or more")
        self.bsz, self.bptt, self.ext_len = bsz, bptt, ext_len
        self.rows = data.numel() // bsz
        if self.rows < 2:
            raise InputError(
                f"the text has {data.numel()} tokens, too few for a batch size (bsz) of {bsz}, "
                f"which needs {2 * bsz}: lower the batch size or give more text"
            )
        own = data[: self.rows * bsz].view(bsz, self.rows)[streams or slice(None)]
        self.data = own.t().contiguous().to(device)  # (rows, streams)

    def __len__(self) -> int:
        """Number of batches in a pass of fixed length from the start."""
        return -(-(self.rows - 1) // self.bptt)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def get_batch(self, i: int, bptt: int | None = None) -> Batch:
        """The batch of ``bptt`` positions (None: the iterator's ``bptt``) that begins at row ``i``.

        Raises:
            InputError: ``i`` is not a row of the text, or is its last row.
        """
        if not 0 <= i < self.rows - 1:
            raise InputError(f"no batch starts at row {i}: rows go from 0 to {self.rows - 2}")
        seq_len = min(bptt or self.bptt, self.rows - 1 - i)
        end = i + seq_len
        data = self.data[max(0, i - self.ext_len) : end]  # (min(i, ext_len) + seq_len, bsz)
        target = self.data[i + 1 : end + 1]  # (seq_len, bsz)
        return data, target, seq_len

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches of fixed length from row ``start`` to the end of the text.

        A pass that has read r rows continues with ``iterate(r)``. At the end of the text this
        yields nothing; a start outside of it raises an InputError.
        """
        self._check_start(start)
        return (self.get_batch(i) for i in range(start, self.rows - 1, self.bptt))

    def iterate_varlen(
        self, start: int = 0, generator: random.Random | None = None
    ) -> Iterator[Batch]:
        """Yield batches of random length from row ``start`` to the end of the text.

        The mean length is bptt with probability 0.95, else bptt / 2. Normal noise of standard
        deviation 5 is added, and the result is clipped to [5, bptt + 15]. The last batch has the
        rest of the text.

        ``generator`` draws the lengths (a checkpoint should hold its state); None makes one with
        seed 0. A start outside the text raises an InputError.
        """
        self._check_start(start)
        return self._walk_varlen(start, generator or random.Random(0))

    def _walk_varlen(self, i: int, generator: random.Random) -> Iterator[Batch]:
        while i < self.rows - 1:
            full = generator.random() < FULL_LENGTH_PROBABILITY
            mean = self.bptt if full else self.bptt / 2
            length = int(generator.gauss(mean, LENGTH_STD))
            length = min(self.bptt + MAX_EXTRA_LENGTH, max(MIN_LENGTH, length))
            batch = self.get_batch(i, length)
            yield batch
            i += batch[2]

    def _check_start(self, start: int) -> None:
        # rows - 1 is the position after a finished pass, so it is a valid start.
        if not 0 <= start <= self.rows - 1:
            raise InputError(f"start row {start} is outside the text: rows 0 to {self.rows - 1}")
