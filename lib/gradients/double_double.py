"""Elementwise arithmetic on unevaluated sums hi + lo, with twice the digits of float64.

The operations are error-free transformations: Dekker 1971; Knuth, The Art of Computer Programming,
volume 2, section 4.2.2. ``hi`` is the sum rounded to float64. ``lo`` may be stored in a smaller
format.
"""

from torch import Tensor

Pair = tuple[Tensor, Tensor]

_SPLIT = 2.0**27 + 1  # splits a float64 into two halves of 26 bits (Dekker)


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """a + b exactly, as the rounded sum and its rounding error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Tensor, factor: float) -> Pair:
    """a * factor exactly, as the rounded product and its rounding error."""
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
    """Inverse of :func:`combine`: the ``old`` from which ``combine`` made ``mixed``."""
    more, its_error = two_product(new, take)
    total, rest = two_sum(mixed[0], -more)
    rest = rest + (mixed[1] - its_error)
    quotient = total / keep
    product, error = two_product(quotient, keep)
    return two_sum(quotient, ((total - product) - error + rest) / keep)
