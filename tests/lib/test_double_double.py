"""Sums hi + lo against exact fractions."""

from fractions import Fraction

import pytest
import torch

from lib.gradients.iterations import combine, take_apart, two_product, two_sum


def draw(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(200, generator=generator, dtype=torch.float64)
    return numbers * 10.0 ** torch.randint(-8, 9, (200,), generator=generator)


def exact(pair) -> list[Fraction]:
    high, low = pair
    return [Fraction(h) + Fraction(x) for h, x in zip(high.tolist(), low.tolist(), strict=True)]


def test_sums_and_products_are_exact():
    a, b = draw(0), draw(1)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert exact(two_sum(a, b)) == [Fraction(x) + Fraction(y) for x, y in pairs]
    for factor in (0.8, 1 - 0.8, 1 / 3, 1.0):
        expected = [Fraction(x) * Fraction(factor) for x in a.tolist()]
        assert exact(two_product(a, factor)) == expected


@pytest.mark.parametrize("b", [0.8, 0.5, 0.3])
def test_damped_steps_and_back(b):
    old, new = (draw(0), 1e-17 * draw(2)), draw(1)
    old = two_sum(*old)
    mixed = combine(old, new, b)
    assert torch.equal(mixed[0], mixed[0] + mixed[1])  # the sum rounded
    keep, take = Fraction(1 - b), Fraction(b)
    for found, x, y in zip(exact(mixed), exact(old), new.tolist(), strict=True):
        expected = keep * x + take * Fraction(y)
        scale = abs(keep * x) + abs(take * Fraction(y))
        assert abs(found - expected) <= Fraction(2) ** -102 * scale
    back = take_apart(mixed, new, b)
    for found, x, y in zip(exact(back), exact(old), new.tolist(), strict=True):
        scale = (abs(keep * x) + abs(take * Fraction(y))) / keep
        assert abs(found - x) <= Fraction(2) ** -100 * scale
