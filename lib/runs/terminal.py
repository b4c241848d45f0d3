"""Lines for the terminal, whose loss or narrow encoding costs nothing but the output."""

import contextlib
import os
import sys
from typing import TextIO

from lib.errors import needs

with needs("runs"):
    from tqdm import tqdm


def prepare() -> None:
    """Let the standard streams print any text, and replace those that are closed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # otherwise the next file opened would get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Not every stream has an encoding, or can be changed.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")


def put(line: str, stream: TextIO, end: str = "\n") -> OSError | None:
    """Write a line above a progress bar; return the error if the stream can no longer be written.

    Its later lines are then dropped, and the exit of Python does not fail on those before.
    """
    try:
        tqdm.write(line, stream, end)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        return error
    return None
