"""Packages that only some uses need, and one clear line where such a package is missing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lib.errors import InputError

_OWN = ("lib", "deq_sequence", "mdeq_vision")


class MissingExtra(InputError, ImportError):
    """A package is not installed; the message names it and the command that installs it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """A context for imports of packages of an ``extra`` in pyproject.toml, such as 'images'.

    Raises:
        MissingExtra: a package is not installed. An import of our own that fails is a bug and
            stays a ModuleNotFoundError.
    """
    try:
        yield
    except (ModuleNotFoundError, MissingExtra) as error:  # the outermost context names the extra
        name = (error.name or "").partition(".")[0]
        if name in _OWN:
            raise
        command = f"pip install -e '.[{extra}]'"
        missing = MissingExtra(f"{name} is not installed: run {command} in the repository")
        missing.name = name
        raise missing from error


@contextmanager
def command_needs(extra: str, program: str) -> Iterator[None]:
    """As :func:`needs`, for a command's imports: print one line and exit with code 2."""
    try:
        with needs(extra):
            yield
    except MissingExtra as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
