"""The one exception for bad input."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: a file, flag, setting or argument that cannot be used.

    Its message is one clear line that names the thing, its value, and the way out. The commands
    print it without a traceback and leave with exit code 2; in a notebook it is a ``ValueError``.
    """


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the name of a flag or setting before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
