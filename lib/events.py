"""The figures of a run over its steps, in TensorBoard's format."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_FLUSH = 120.0  # seconds


class Events:
    """A file of events that is written by whoever adds to it.

    SummaryWriter leaves that to a thread, which dies on a full disk, with a traceback; and once its
    queue is full, it makes the run wait for that thread for ever.

    Args:
        folder: where the file is made; it exists.
        purge_step: hide what earlier files there have of this step and later ones.
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
        """Bring all to the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
