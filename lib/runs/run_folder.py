"""The folder of a run: text log, TensorBoard events, metrics, settings; and the progress bar."""

import contextlib
import json
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

from lib.errors import DEQWarning, InputError, needs
from lib.runs.atomic_files import atomic_write
from lib.runs.ownership import LOCK
from lib.runs.retention import clean_temporaries, versions
from lib.runs.terminal import put

with needs("runs"):
    from tqdm import tqdm

LOG, METRICS, SETTINGS, CHECKPOINT, WEIGHTS, AUDIT = (
    "log.txt",
    "metrics.jsonl",
    "settings.json",
    "checkpoint.pt",
    "model.pt",
    "audit.json",  # what scripts/audit.py found
)
_OF_KIND = {"valid": {"phase": str}, "summary": {"finished": bool}}  # what such records have
_OF_THE_END = ("final_", "summary")  # prefixes of the record kinds written at the end of a run


def run_folder(work_dir: str, dataset: str, name: str) -> Path:
    """``<work_dir>-<dataset>/<name>``; without a name ('' or 'N/A') a time stamp is the name."""
    if name in ("", "N/A"):
        name = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"{work_dir}-{dataset}") / name


def is_used(folder: Path) -> bool:
    """Whether a run has written a file in ``folder``, hidden ones and the lock apart."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return any(e.is_file() and e.name != LOCK and not e.name.startswith(".") for e in entries)


def check_unused(folder: Path, way_out: str, *, anew: bool = False) -> None:
    """Raise an InputError if ``folder`` already holds a run.

    With ``anew`` this is a run with a checkpoint, without it a run with any file.
    """
    if versions(folder / CHECKPOINT) or (is_used(folder) and not anew):
        raise InputError(f"{folder} already holds a run: {way_out}")


def last_good(folder: Path | None) -> str:
    """The end of an error message: the path of the last good checkpoint; "" if there is none."""
    if folder is None or not versions(folder / CHECKPOINT):
        return ""
    return f"; the last good state is {folder / CHECKPOINT}"


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run, oldest first, up to the first damaged one; a null is read as NaN.

    A kill can leave the last record incomplete.
    """
    path = folder / METRICS
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            break
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
    """Peak memory so far in MiB: allocated memory on a GPU, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Run:
    """Writes the log, records and events of a training run; a debug run writes no file.

    A failed write, such as on a full disk, does not raise at once. :meth:`sync` raises the error
    before the next checkpoint is saved. So all processes learn of the error, and no checkpoint is
    ahead of its records.

    Attributes:
        failure: the first error of a write; nothing is written after it.

    Args:
        folder: the run's folder, created if absent; None writes no file (a debug run).
        settings: name and content of the file that holds the resolved settings.
        resume_step: None for a new run, else the step to continue from. Records of later steps
            and of the end are dropped: the resumed run writes them again.
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
    ):
        self.folder, self.quiet = folder, quiet
        self._events, self._log, self._metrics = None, None, None
        self.bar: tqdm | None = None
        self.failure: OSError | None = None
        if folder is None:
            return
        # Both folders before any file: if one cannot be made, no half-begun run is left behind.
        for place in (events or folder, folder):
            place.mkdir(parents=True, exist_ok=True)
        clean_temporaries(folder)
        self._events_folder = events or folder
        try:
            self._begin(settings, resume_step)
        except OSError as error:
            self.close()
            raise InputError(
                f"{error.filename or self._events_folder} could not be written "
                f"({error.strerror or error}): mend that{last_good(folder)}"
            ) from error

    def _begin(self, settings: tuple[str, str], resume_step: int | None) -> None:
        """Write the settings, drop the records that come again, open the files."""
        folder, (name, content) = self.folder, settings
        with atomic_write(folder / name) as file:
            file.write(content.encode())
        kept = [
            record
            for record in read_metrics(folder)
            if resume_step is not None
            and record["step"] <= resume_step
            and not record["kind"].startswith(_OF_THE_END)
        ]
        with atomic_write(folder / METRICS) as file:
            file.write("".join(_line(record) + "\n" for record in kept).encode())
        self._metrics = open(folder / METRICS, "a")  # noqa: SIM115  (open for the whole run)
        how = {"mode": "w" if resume_step is None else "a", "encoding": "utf-8"}
        self._log = open(folder / LOG, errors="backslashreplace", **how)  # noqa: SIM115
        # Imported here: benchmarks write no events and do not need tensorboardX.
        from lib.runs.events import Events

        purge_step = None if resume_step is None else resume_step + 1
        self._events = Events(self._events_folder, purge_step)

    @classmethod
    def silent(cls) -> "Run":
        """A run that writes and prints nothing, for all processes except the first."""
        return cls(None, ("", ""), quiet=True)

    def log(self, line: str) -> None:
        """Write one line to the terminal and to log.txt."""
        lost = None if self.quiet else put(line, sys.stdout)
        if self._log is not None:
            self._attempt(self.folder / LOG, lambda: print(line, file=self._log, flush=True))
        if lost is not None:
            self.quiet = True
            self.log(f"warning: the standard output is lost ({lost.strerror}): see {LOG} alone")

    def record(self, kind: str, step: int, **values: float) -> None:
        """Write a record to metrics.jsonl; finite numbers go to TensorBoard as ``kind/name``.

        JSON has no NaN and no infinity: null stands for both.
        """
        if self._metrics is None:
            return
        text = _line({"kind": kind, "step": step, **values})
        self._attempt(self.folder / METRICS, lambda: print(text, file=self._metrics, flush=True))

        def write() -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._events.scalar(f"{kind}/{name}", value, step)

        self._attempt(self._events_folder, write)

    def sync(self) -> None:
        """Flush the log, records and events to the disk.

        Raises:
            OSError: a write failed, now or earlier.
        """
        if self.folder is not None:
            self._attempt(self.folder / LOG, lambda: os.fsync(self._log.fileno()))
            self._attempt(self.folder / METRICS, lambda: os.fsync(self._metrics.fileno()))
            self._attempt(self._events_folder, self._events.flush)
        if self.failure is not None:
            raise self.failure

    def _attempt(self, path: Path, write: Callable[[], object]) -> None:
        """Do a write to ``path`` and note its error; do nothing after an earlier error."""
        if self.failure is not None:
            return
        try:
            write()
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(path))

    def progress(self, total: int, initial: int) -> tqdm:
        """A progress bar over the steps, shown on a terminal only."""
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
    """Within a ``with`` block, write each DEQWarning to the log, every distinct message once.

    Warnings about unsolved forward passes are left out, as the log has their residuals.
    """
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
