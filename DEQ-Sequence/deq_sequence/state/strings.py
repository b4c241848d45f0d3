"""Strings of group elements with their running products: the data of state tracking.

A string is a start token and L elements g_1 ... g_L, drawn uniformly. The answer at g_i is the
product g_1 ... g_i. For a group that is not solvable, such as A5, a transformer of fixed depth
cannot find the answer for every length, by a conjecture of complexity theory (Merrill, Petty and
Sabharwal 2024, arXiv 2404.08819).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_sequence.state.groups import Group, get_group
from deq_sequence.text.vocabulary import Vocab

PREFIX = "state:"
START = "<start>"


@dataclass(frozen=True)
class StateStrings:
    """The strings of a data set ``state:GROUP``. They are made when they are read.

    Attributes:
        group: the group.
        vocab: its elements, then the start token.
        seed: the seed of all strings. Each split has its own random numbers.
    """

    group: Group
    vocab: Vocab
    seed: int

    @property
    def description(self) -> str:
        """The size, for the log."""
        return f"running products of {len(self.group)} elements"

    def draw(self, split: str, index: int, number: int, length: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of a split: words (1 + length, number) and answers (length, number).

        The same arguments give the same batch on every machine, so there is no position to save.
        """
        text = f"{self.group.name} {self.seed} {split} {index}"
        digest = hashlib.sha256(text.encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        elements = torch.randint(len(self.group), (length, number), generator=random)
        start = torch.full((1, number), len(self.group))
        return torch.cat([start, elements]), self.group.running_products(elements)


def is_state(dataset: str) -> bool:
    """Whether a data set's name is ``state:...``."""
    return dataset.startswith(PREFIX)


def get_state_strings(dataset: str, seed: int) -> StateStrings:
    """The strings of a data set such as ``state:S3``.

    Raises:
        InputError: the group is unknown.
    """
    group = get_group(dataset.removeprefix(PREFIX))
    return StateStrings(group, Vocab.from_symbols([*group.symbols, START]), seed)
