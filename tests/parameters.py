"""Parameters of tests."""

from collections.abc import Iterable

import pytest


def slow_but(fast: Iterable, values: Iterable) -> list:
    """All ``values`` for a parametrised test, tuples for several arguments; those that are not
    among ``fast`` are marked slow."""
    fast = list(fast)
    return [v if v in fast else _slow(v if isinstance(v, tuple) else (v,)) for v in values]


def _slow(values: tuple):
    return pytest.param(*values, marks=pytest.mark.slow)
