"""Multiplication tables of finite groups: Zn, Sn and An."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import InputError

KINDS = "Zn (n from 2 to 1000), Sn (n from 2 to 6) and An (n from 3 to 6)"
_SIZES = {"Z": range(2, 1001), "S": range(2, 7), "A": range(3, 7)}


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group; its elements are the numbers from 0 to n - 1, and 0 is the identity.

    Attributes:
        name: such as "S3".
        symbols: n strings. Element i of Zn is i; that of Sn and An is a permutation p, written
            p(1) p(2) ... without spaces.
        table: LongTensor (n, n). ``table[a, b]`` is the product of a, then b: of permutations
            the one that applies a first.
    """

    name: str
    symbols: list[str]
    table: Tensor

    def __len__(self) -> int:
        return len(self.symbols)

    def running_products(self, elements: Tensor) -> Tensor:
        """p_1 = g_1, p_i = p_{i-1} g_i along the first dimension: (L, ...) -> (L, ...)."""
        products = [elements[0]]
        for element in elements[1:]:
            products.append(self.table[products[-1], element])
        return torch.stack(products)


def get_group(name: str) -> Group:
    """The group of a name: Zn adds modulo n, Sn permutes n points, An is its even half.

    Raises:
        InputError: there is no such group here.
    """
    kind, degree = name[:1], name[1:]
    if kind not in _SIZES or not degree.isdecimal() or int(degree) not in _SIZES[kind]:
        raise InputError(f"unknown group {name!r}: give one of {KINDS}")
    n = int(degree)
    if kind == "Z":
        numbers = torch.arange(n)
        return Group(name, [str(i) for i in range(n)], (numbers[:, None] + numbers) % n)
    permutations = [p for p in itertools.permutations(range(n)) if kind == "S" or _is_even(p)]
    symbols = ["".join(str(i + 1) for i in p) for p in permutations]
    rows = torch.tensor(permutations)  # in lexicographic order: the identity is the first
    places = n ** torch.arange(n - 1, -1, -1)
    codes = rows @ places  # ascending
    products = rows[:, rows].transpose(0, 1)  # [a, b] is b(a(.))
    return Group(name, symbols, torch.searchsorted(codes, products @ places))


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
