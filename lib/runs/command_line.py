"""What every command shares: a parser, the standard streams, errors, exit codes."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

import torch.distributed as dist

from lib.errors import InputError, did_you_mean, needs
from lib.runs.interrupts import Stopped, TrainingError, out_of_memory
from lib.runs.processes import end_at_once, lost_contact

with needs("runs"):
    from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """A parser that raises an InputError for a bad command line; no flag is abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(message)

    def _get_values(self, action, arg_strings):
        if arg_strings == ["--"] and action.nargs is None:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def parse_args(self, args=None, namespace=None):
        return self._all_known(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(self, args=None, namespace=None):
        return self._all_known(*self.parse_known_intermixed_args(args, namespace))

    def _all_known(self, found: argparse.Namespace, unknown: list[str]) -> argparse.Namespace:
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = did_you_mean(unknown[0].split("=")[0], flags, otherwise=" (see --help)")
            raise InputError(f"unknown flag {unknown[0]}{hint}")
        return found


def prepare_streams() -> None:
    """Let the standard streams print any text; replace closed ones."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # else the next file gets its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Not every stream can be changed.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")


def put(line: str, stream: TextIO, end: str = "\n") -> OSError | None:
    """Write a line above a progress bar; return the error if the stream is lost, then silent."""
    try:
        tqdm.write(line, stream, end)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        return error
    return None


def exit_code(program: str, action: Callable[[], object]) -> int:
    """Run ``action`` and return the exit code.

    An expected error is one line on stderr that begins with ``program``. Bad input or a file error
    gives code 2, failed training or a lost process 1, :class:`Stopped` its own, an interrupt 130.
    Any other error is raised. One of several processes ends by :func:`end_at_once`.
    """
    prepare_streams()
    code = 0
    try:
        action()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        found = _explanation(error)
        if found is None:  # a bug: show the traceback
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            end_at_once(1)
        line, code = found
        lost = put("", sys.stdout, end="")  # what could not be written is not tried again
        if lost is not None and isinstance(error, OSError) and error.filename is None:
            line = f"the standard output is lost ({lost.strerror})"
        put(f"{program}: {' '.join(line.split())}", sys.stderr)
        end_at_once(code)
    end_at_once(code)
    return code


def _explanation(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an expected error."""
    match error:
        case InputError() | OSError():  # no permission, no space: the message names the file
            return str(error), 2
        case TrainingError():
            return str(error), 1
        case Stopped():
            return str(error), error.code
        case KeyboardInterrupt():
            return "interrupted", 130
    if lost := lost_contact(error):
        return f"lost the other processes ({lost}): start all of them again", 1
    if lack := out_of_memory(error):
        return f"{lack}: take a smaller model or batch", 1
    return None
