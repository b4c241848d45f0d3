"""When a run should stop early: a signal asked for it, or its time is nearly up."""

import math
import signal
import threading
import time

_ECHO = 5.0  # seconds


class Stopped(Exception):
    """The run has saved its state and stopped before its end.

    Attributes:
        code: exit code of the command: 128 + the signal's number, or 0 where the time was up.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Stopping:
    """Collects the wish to stop, from SIGTERM, SIGINT and a time limit.

    Signals are caught within a ``with`` block only, and only in the main thread. Another one some
    seconds later acts as if nobody had caught it; one that comes sooner is an echo, as the
    terminal, torchrun and a cluster may all send theirs.

    The time counts from the object's making. A run stops so early that one more stretch of work as
    long as the longest so far, and then the saving, would still fit.

    Args:
        max_minutes: the time limit; 0 is none.
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
        self._put_back()

    @property
    def wanted(self) -> bool:
        """Whether something has asked to stop; cheap, for a loop that cannot stop everywhere."""
        return self.signal is not None or self.time_is_up

    def check(self) -> bool:
        """``wanted``, with a look at the clock: to be called between two stretches of work."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._checked)
        self._checked = now
        self.time_is_up |= now + 2 * self._longest > self._deadline
        return self.wanted

    @property
    def reason(self) -> str:
        """What asked to stop: a signal's name, or the time limit; "" if nothing did."""
        if self.signal is not None:
            return self.signal.name
        return "the time limit" if self.time_is_up else ""

    @property
    def code(self) -> int:
        """The exit code that goes with the reason."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled = signal.Signals(number), now
        elif now > self._signalled + _ECHO:
            self._put_back()
            signal.raise_signal(number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
