"""The one exception for bad input, and the one warning of a bad solve."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: a file, flag, setting or argument that cannot be used.

    Its message is one clear line that names the thing, its value, and the way out. The commands
    print it without a traceback and leave with exit code 2; in a notebook it is a ``ValueError``.
    """


class DEQWarning(RuntimeWarning):
    """A solve that ended badly enough to spoil the result or its gradient."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the name of a flag or setting before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the nearest known one, if there is any."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else otherwise
