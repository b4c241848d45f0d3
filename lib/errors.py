"""The exception for bad input, and the warning about a bad solve."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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
