"""The folder of a run: its owner, log, TensorBoard events, metrics, settings; the progress bar."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import resource
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from lib.errors import DEQWarning, InputError, needs
from lib.runs.atomic_files import atomic_write
from lib.runs.command_line import put
from lib.runs.retention import clean_temporaries, versions

with needs("runs"):
    from tqdm import tqdm

LOCK, LOG, METRICS, SETTINGS = "run.lock", "log.txt", "metrics.jsonl", "settings.json"
CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.pt"
_OF_KIND = {"valid": {"phase": str}, "summary": {"finished": bool}}  # what such records have
_OF_THE_END = ("final_", "summary")  # prefixes of the record kinds written at the end of a run
_GROUPS = {"solver": "residual|nfe|broken", "jacobian": "jac_|sradius", "speed": "_per_s|_mib"}
_FLUSH = 120.0  # seconds between flushes of the events


def own(folder: Path) -> BinaryIO | None:
    """Make this process the one that writes in ``folder``, until the returned file is closed.

    The file, run.lock, names the owner and stays there. Its flock is released by the system when
    the process ends, however it ends.

    On NFS, Linux passes a flock to the server: it holds between machines, and after a machine's
    failure until its lease ends (NFSv4: 90 seconds by default). With the mount options nolock or
    local_lock it holds within one machine only.

    Returns:
        The locked file; None on a file system without locks.

    Raises:
        InputError: another process owns the folder, or a file that is written in place is a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / LOCK, folder / LOG):
        if path.is_symlink():
            raise InputError(f"{path} is a link, so a run would write elsewhere: delete it")
    # Neither truncated nor written before it is locked: it may name the present owner.
    file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115  (open for the whole run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise InputError(
            f"{folder} is in use by {owner}: wait until that run ends, or start one elsewhere"
        ) from None
    except OSError:
        file.close()
        return None
    # A fork shares the lock: loading processes could hold it for seconds after the owner's death.
    weak = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (inherited := weak()) and inherited.close())
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from others, while it exists; None without one."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def new_folder(path: Path) -> Path:
    """Create and return ``path``; or PATH-2, PATH-3, ... if that exists."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def is_used(folder: Path) -> bool:
    """Whether a run has written a file in ``folder``, besides hidden ones and the lock."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return any(e.is_file() and e.name != LOCK and not e.name.startswith(".") for e in entries)


def check_unused(folder: Path, way_out: str, *, anew: bool = False) -> None:
    """Refuse a ``folder`` that holds a run with any file (``anew``: with a checkpoint)."""
    if versions(folder / CHECKPOINT) or (is_used(folder) and not anew):
        raise InputError(f"{folder} already holds a run: {way_out}")


def last_good(folder: Path | None) -> str:
    """The end of a message: the path of the last good checkpoint; "" without one."""
    if folder is None or not versions(folder / CHECKPOINT):
        return ""
    return f"; the last good state is {folder / CHECKPOINT}"


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run, oldest first, with NaN for null, without damaged ones.

    A kill can leave the last one incomplete.
    """
    path = folder / METRICS
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def _line(record: dict) -> str:
    """A record as JSON."""
    lacking = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(record | lacking, allow_nan=False)


def _is_record(found) -> bool:
    """Whether ``found`` has what the readers of records take for granted."""
    if not isinstance(found, dict):
        return False
    types = {"kind": str, "step": int} | _OF_KIND.get(str(found.get("kind")), {})
    return all(type(found.get(name)) is kind for name, kind in types.items())


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class _Events:
    """A file of TensorBoard events that is written in the thread of the caller.

    SummaryWriter's own thread dies on a full disk, and the run then waits for ever. Earlier files'
    data from ``purge_step`` on are hidden.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        # Here, as benchmarks do not need it.
        with needs("runs"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar, text

        self._event, self._scalar, self.text = Event, scalar, text
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self.add(purge_step, file_version="brain.Event:2")
            self.add(purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def scalar(self, kind: str, name: str, value: float, step: int) -> None:
        tag = f"{kind}/{name}"
        for group, parts in _GROUPS.items():
            if re.search(parts, name):
                tag = f"{group}/{kind}_{name}"
        self.add(step, summary=self._scalar(tag, value))
        if time.monotonic() > self._flushed + _FLUSH:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def add(self, step: int, **content) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))


class Run:
    """Writes the log, records and events of a training run.

    The first failed write, such as on a full disk, is the last. :meth:`sync` raises its error
    (``failure``) before the next checkpoint is saved: no checkpoint is ahead of its records.

    Args:
        folder: the run's folder, created if absent; None writes no file (a debug run).
        settings: name and content of the file that holds the resolved settings.
        beside: names and contents of other files.
        resume_step: None for a new run, else the step to continue from. Records of later steps
            and of the end are dropped, as they come again.
        events: folder of the TensorBoard events; None means ``folder``.
        quiet: print nothing.

    Raises:
        InputError: a file in one of the folders cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: tuple[str, str],
        resume_step: int | None = None,
        *,
        events: Path | None = None,
        quiet: bool = False,
        beside: Iterable[tuple[str, str]] = (),
    ):
        self.folder, self.quiet = folder, quiet
        self._events, self._log, self._metrics = None, None, None
        self.bar: tqdm | None = None
        self.failure: OSError | None = None
        if folder is None:
            return
        self._events_folder = events or folder
        # Both folders before any file: if one cannot be made, no half-begun run is left behind.
        for place in (self._events_folder, folder):
            place.mkdir(parents=True, exist_ok=True)
        clean_temporaries(folder)
        try:
            self._begin((settings, *beside), resume_step)
        except OSError as error:
            self.close()
            raise InputError(
                f"{error.filename or self._events_folder} could not be written "
                f"({error.strerror or error}): mend that{last_good(folder)}"
            ) from error

    def _begin(self, contents: tuple[tuple[str, str], ...], resume_step: int | None) -> None:
        """Write the settings, drop records, open the files."""
        folder = self.folder
        self._lock = _identity(folder / LOCK)
        for name, content in contents:
            with atomic_write(folder / name) as file:
                file.write(content.encode())
        last = -math.inf if resume_step is None else resume_step
        kept = [
            record
            for record in read_metrics(folder)
            if record["step"] <= last and not record["kind"].startswith(_OF_THE_END)
        ]
        with atomic_write(folder / METRICS) as file:
            file.write("".join(_line(record) + "\n" for record in kept).encode())
        self._metrics = open(folder / METRICS, "a")  # noqa: SIM115  (open for the whole run)
        how = {"encoding": "utf-8", "errors": "backslashreplace"}
        self._log = open(folder / LOG, "w" if resume_step is None else "a", **how)  # noqa: SIM115
        purge_step = None if resume_step is None else resume_step + 1
        self._events = _Events(self._events_folder, purge_step)
        self.show(purge_step or 0, self._events.text("settings", f"```\n{contents[0][1]}```"))

    @classmethod
    def silent(cls) -> "Run":
        """A run that writes and prints nothing, for processes other than the first."""
        return cls(None, ("", ""), quiet=True)

    def still_has_its_folder(self) -> bool:
        """False if the folder was moved or removed, or another run has begun in its place."""
        # Someone may remove the lock alone.
        lock = _identity(self.folder / LOCK)
        return lock == self._lock if lock else (self.folder / LOG).is_file()

    def log(self, line: str) -> None:
        """Write one line to the terminal and to log.txt."""
        lost = None if self.quiet else put(line, sys.stdout)
        if self._log is not None:
            self._attempt(self.folder / LOG, lambda: print(line, file=self._log, flush=True))
        if lost is not None:
            self.quiet = True
            self.log(f"warning: the standard output is lost ({lost.strerror}): see {LOG} alone")

    def record(self, kind: str, step: int, **values: float) -> None:
        """Write a record to metrics.jsonl; finite numbers go to TensorBoard, in groups.

        JSON has no NaN and no infinity: null stands for both.
        """
        if self._metrics is None:
            return
        text = _line({"kind": kind, "step": step, **values})
        self._attempt(self.folder / METRICS, lambda: print(text, file=self._metrics, flush=True))

        def write() -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._events.scalar(kind, name, value, step)

        self._attempt(self._events_folder, write)

    def show(self, step: int, summary) -> None:
        """Write a summary of tensorboardX; not in a run without a folder."""
        self._attempt(self._events_folder, lambda: self._events.add(step, summary=summary))

    def sync(self) -> None:
        """Flush all to the disk; raise the OSError of a write that failed, now or earlier."""
        if self.folder is not None:
            self._attempt(self.folder / LOG, lambda: os.fsync(self._log.fileno()))
            self._attempt(self.folder / METRICS, lambda: os.fsync(self._metrics.fileno()))
            self._attempt(self._events_folder, self._events.flush)
        if self.failure is not None:
            raise self.failure

    def _attempt(self, path: Path, write: Callable[[], object]) -> None:
        """Write and note an error, unless one failed before."""
        if self.failure is not None:
            return
        try:
            write()
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(path))

    def progress(self, total: int, initial: int) -> tqdm:
        """A bar over the steps, shown on a terminal only."""
        self.bar = tqdm(
            total=total, initial=initial, unit="step", disable=self.quiet or None, leave=False
        )
        return self.bar

    def close(self) -> None:
        for resource_ in (self.bar, self._events, self._log, self._metrics):
            if resource_ is not None:
                with contextlib.suppress(OSError):  # unwritten data, which sync has reported
                    resource_.close()


@contextmanager
def warnings_in(log: Callable[[str], None]) -> Iterator[None]:
    """A context that logs each DEQWarning once, but not those on forward solves: their residuals
    are in the log."""
    said, show = set(), warnings.showwarning

    def logged(message, category, *where) -> None:
        if not issubclass(category, DEQWarning):
            show(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            log(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", DEQWarning)
        warnings.filterwarnings("ignore", "a forward solve", DEQWarning)
        warnings.showwarning = logged
        yield
