"""The exception for bad input, and the warning about a bad solve."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real


class InputError(ValueError):
    """Bad input: a file, flag, setting or argument that cannot be used.

    The message is one line: what is wrong, its value, and what to do. The commands print the
    message without a traceback and exit with code 2. In a notebook the error is a ``ValueError``.
    """


class DEQWarning(RuntimeWarning):
    """A solve that ended badly enough to spoil the result or its gradient."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A context that puts the name of a flag or setting before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the nearest known word, else ``otherwise``."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else otherwise


def check(condition: bool, name: str, value, accepted: str) -> None:
    """Raise an InputError of one line unless ``condition`` holds."""
    if not condition:
        raise InputError(f"{name} is {value!r}, but must be {accepted}")


def check_count(name: str, value, least: int = 1) -> None:
    """Refuse a value that is not an integer of at least ``least``."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    check(integer and value >= least, name, value, f"an integer of at least {least}")


def is_number(value) -> bool:
    """Whether a value is a real number; True and False do not count as numbers."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: str, value, *, positive: bool = False) -> None:
    """Refuse a value that is not a number of at least 0 (``positive``: above 0)."""
    fits = is_number(value) and (value > 0 if positive else value >= 0)
    check(fits, name, value, "a number above 0" if positive else "a number of at least 0")
