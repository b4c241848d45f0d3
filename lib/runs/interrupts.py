"""Early end of a run: by a signal, a time limit, failed training, lack of memory."""

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib.errors import InputError

_ECHO = 5.0  # seconds in which further signals are ignored


class Stopped(Exception):
    """The run saved its state and stopped early; ``code`` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and names the last good state."""


class Stopping:
    """Collects requests to stop from SIGTERM, SIGINT and a time limit (0: none).

    Signals are caught in the main thread and a ``with`` block only. The terminal, torchrun and a
    cluster may all send a signal for one request: further ones are ignored for 5 seconds. A later
    one has the effect that it has outside the block.

    Time counts from the creation of the object. A run stops when the time left is less than twice
    the longest stretch of work so far: enough for one more stretch and the save.
    """

    def __init__(self, max_minutes: float = 0.0):
        now = time.monotonic()
        self._deadline = now + 60 * max_minutes if max_minutes > 0 else math.inf
        self._checked, self._longest = now, 0.0
        self._before: dict = {}
        self._signalled = -math.inf
        self.signal: signal.Signals | None = None
        self.time_is_up = False

    def __enter__(self) -> "Stopping":
        self._checked = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def wanted(self) -> bool:
        """Whether a stop was requested; for inner loops, without a look at the clock."""
        return self.signal is not None or self.time_is_up

    def check(self) -> bool:
        """Check the time limit between two stretches of work; return ``wanted``."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._checked)
        self._checked = now
        self.time_is_up |= now + 2 * self._longest > self._deadline
        return self.wanted

    @property
    def reason(self) -> str:
        """A signal's name or "the time limit"; "" without a request."""
        if self.signal is not None:
            return self.signal.name
        return "the time limit" if self.time_is_up else ""

    @property
    def code(self) -> int:
        """The exit code: 128 + the signal's number, else 0."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled = signal.Signals(number), now
        elif now > self._signalled + _ECHO:
            self.__exit__()
            signal.raise_signal(number)


def out_of_memory(error: BaseException) -> str:
    """What to say of an error that is a lack of memory, on a GPU or the CPU; else ""."""
    text, kinds = str(error), (MemoryError, torch.cuda.OutOfMemoryError)
    if not isinstance(error, kinds) and "can't allocate memory" not in text:
        return ""
    tried = re.search("tried to allocate ([0-9.]+ [A-Za-z]+)", text, re.IGNORECASE)
    return f"out of memory ({tried[1]} more were needed)" if tried else "out of memory"


@contextmanager
def memory_for(way_out: str) -> Iterator[None]:
    """A context that turns a lack of memory into an InputError with advice."""
    try:
        yield
    except Exception as error:
        if found := out_of_memory(error):
            raise InputError(f"{found}: {way_out}") from error
        raise
