"""The exceptions for bad input and missing packages, and the warning about a bad solve."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real


class InputError(ValueError):
    """Bad input: a file, flag, setting or argument that cannot be used.

    The message is one line: what is wrong, its value, and what to do. The commands print it without
    a traceback and exit with code 2.
    """


class MissingExtra(InputError, ImportError):
    """A package is not installed; the message names the command that installs it."""


class DEQWarning(RuntimeWarning):
    """A solve that ended badly enough to spoil the result or its gradient."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A context that puts the name of a flag, setting or file before an InputError's message.

    A message that begins with the name stays as it is.
    """
    try:
        yield
    except InputError as error:
        if str(error).startswith((f"{what} ", f"{what}:")):
            raise
        raise InputError(f"{what}: {error}") from error


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
        if name in ("lib", "deq_sequence", "mdeq_vision"):
            raise
        command = f"pip install -e '.[{extra}]'"
        missing = MissingExtra(f"{name} is not installed: run {command} in the repository")
        missing.name = name
        raise missing from error


@contextmanager
def command_needs(extra: str, program: str) -> Iterator[None]:
    """As :func:`needs`, for a command: print one line and exit with code 2."""
    try:
        with needs(extra):
            yield
    except MissingExtra as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
