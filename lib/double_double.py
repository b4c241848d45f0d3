"""Elementwise arithmetic on unevaluated sums hi + lo, with twice the digits of float64.

Error-free transformations: Dekker 1971; Knuth, The Art of Computer Programming, volume 2, section
4.2.2. ``hi`` is float64 and the sum rounded to it; ``lo`` may be stored in less.
"""

from torch import Tensor

Pair = tuple[Tensor, Tensor]

_SPLIT = 2.0**27 + 1


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """a + b exactly, as its rounded value and the error of that."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Tensor, factor: float) -> Pair:
    """a times a number, likewise."""
    product = a * factor
    scaled = a * _SPLIT
    a_high = scaled - (scaled - a)
    a_low = a - a_high
    high = factor * _SPLIT - (factor * _SPLIT - factor)
    low = factor - high
    return product, ((a_high * high - product) + a_high * low + a_low * high) + a_low * low


def combine(old: Pair, new: Tensor, keep: float, take: float) -> Pair:
    """keep * old + take * new."""
    product, error = two_product(old[0], keep)
    more, its_error = two_product(new, take)
    total, rest = two_sum(product, more)
    return two_sum(total, rest + (error + its_error + keep * old[1]))


def take_apart(mixed: Pair, new: Tensor, keep: float, take: float) -> Pair:
    """The ``old`` that :func:`combine` made ``mixed`` from."""
    more, its_error = two_product(new, take)
    total, rest = two_sum(mixed[0], -more)
    rest = rest + (mixed[1] - its_error)
    quotient = total / keep
    product, error = two_product(quotient, keep)
    return two_sum(quotient, ((total - product) - error + rest) / keep)
