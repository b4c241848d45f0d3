"""One run's folder: text log, TensorBoard events, metrics, settings, and the progress bar."""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from lib.errors import InputError
from lib.files import atomic_write
from lib.retention import clean_temporaries, versions

LOG, METRICS, SETTINGS, CHECKPOINT, WEIGHTS = (
    "log.txt",
    "metrics.jsonl",
    "settings.json",
    "checkpoint.pt",
    "model.pt",
)
_OF_THE_END = ("final_", "summary")  # kinds of records


def run_folder(work_dir: str, dataset: str, name: str) -> Path:
    """``<work_dir>-<dataset>/<name>``; a run without a name ('N/A') gets a time stamp."""
    if name in ("", "N/A"):
        name = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"{work_dir}-{dataset}") / name


def check_unused(folder: Path, way_out: str) -> None:
    """Refuse a folder that already holds a run's checkpoint."""
    if versions(folder / CHECKPOINT):
        raise InputError(f"{folder} already holds a run: {way_out}")


def last_good(folder: Path | None) -> str:
    """The end of a message that names the last good state of a run, if there is one."""
    if folder is None or not versions(folder / CHECKPOINT):
        return ""
    return f"; the last good state is {folder / CHECKPOINT}"


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run, oldest first, up to the first damaged one (a kill cuts the last)."""
    path = folder / METRICS
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            break
        records.append(record)
    return records


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Run:
    """Where a training run writes: everything goes through here, so a debug run writes nothing.

    What cannot be logged or recorded for want of space is an error in ``sync`` only: there all
    processes learn of it, and no checkpoint is saved that is ahead of its records.

    Attributes:
        failure: the first error of a log or a record; nothing more is written after it.

    Args:
        folder: the run's folder, created if absent; None writes no file (a debug run).
        settings: name and content of the file that holds the resolved settings.
        resume_step: None for a new run; else the step to continue from: records beyond it, and
            those of the end (kind "final_..." and "summary"), are dropped, as they come again.
        events: folder of the TensorBoard events; the run's if None.
        quiet: print nothing.
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
        # Both folders before any file: if one cannot be made, no run is half begun.
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
        """Write the settings, trim the records, open the files."""
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
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        self._metrics = open(folder / METRICS, "a")  # noqa: SIM115  (open for the whole run)
        self._log = open(folder / LOG, "w" if resume_step is None else "a")  # noqa: SIM115
        from lib.events import Events  # here: benchmarks write none, and do without tensorboardX

        purge_step = None if resume_step is None else resume_step + 1
        self._events = Events(self._events_folder, purge_step)

    @classmethod
    def silent(cls) -> "Run":
        """Writes and prints nothing, as all processes but the first do."""
        return cls(None, ("", ""), quiet=True)

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.quiet:
            tqdm.write(line)
            sys.stdout.flush()
        if self._log is not None:
            self._attempt(self.folder / LOG, lambda: print(line, file=self._log, flush=True))

    def record(self, kind: str, step: int, **values: float) -> None:
        """One record to metrics.jsonl, and each value to TensorBoard as ``kind/name``."""
        if self._metrics is None:
            return
        text = json.dumps({"kind": kind, "step": step, **values})
        self._attempt(self.folder / METRICS, lambda: print(text, file=self._metrics, flush=True))

        def write() -> None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._events.scalar(f"{kind}/{name}", value, step)

        self._attempt(self._events_folder, write)

    def sync(self) -> None:
        """Bring all that was logged and recorded to the disk.

        Raises:
            OSError: some of it could not be written, now or earlier.
        """
        if self.folder is not None:
            self._attempt(self.folder / LOG, lambda: os.fsync(self._log.fileno()))
            self._attempt(self.folder / METRICS, lambda: os.fsync(self._metrics.fileno()))
            self._attempt(self._events_folder, self._events.flush)
        if self.failure is not None:
            raise self.failure

    def _attempt(self, path: Path, write: Callable[[], object]) -> None:
        """Do a write to ``path``, unless one has failed."""
        if self.failure is not None:
            return
        try:
            write()
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(path))

    def progress(self, total: int, initial: int) -> tqdm:
        """A bar over the steps, on a terminal only."""
        self.bar = tqdm(
            total=total, initial=initial, unit="step", disable=self.quiet or None, leave=False
        )
        return self.bar

    def close(self) -> None:
        for resource_ in (self.bar, self._events, self._log, self._metrics):
            if resource_ is not None:
                with contextlib.suppress(OSError):  # a rest that sync has reported
                    resource_.close()
