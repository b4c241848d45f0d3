"""Scalar curves of a run in TensorBoard's format."""

import time
from pathlib import Path

from lib.errors import needs

with needs("runs"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

_FLUSH = 120.0  # seconds between flushes


class Events:
    """An event file that is written in the thread of the caller.

    SummaryWriter writes in a thread of its own. On a full disk this thread dies with a traceback,
    and once the queue is full, the run waits for it for ever.

    Args:
        folder: an existing folder, in which the file is made.
        purge_step: hide the data of this step and later ones in earlier files of the folder.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._add(Event(step=purge_step, file_version="brain.Event:2"))
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() > self._flushed + _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Flush all events to the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
