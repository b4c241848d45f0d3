"""One run's folder: text log, TensorBoard events, metrics, settings, and the progress bar."""

import json
import math
import os
import resource
import sys
from datetime import datetime
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
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

    Args:
        folder: the run's folder, created if absent; None writes no file (a debug run).
        settings: name and content of the file that holds the resolved settings.
        resume_step: None for a new run; else the step to continue from: records beyond it, and
            those of the end (kind "final_..." and "summary"), are dropped, as they come again.
        events: folder of the TensorBoard events; the run's if None.
        quiet: print nothing, as all processes but the first do.
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
        self.writer, self._log, self._metrics = None, None, None
        self.bar: tqdm | None = None
        if folder is None:
            return
        # Both folders before any file: if one cannot be made, no run is half begun.
        for place in (events or folder, folder):
            place.mkdir(parents=True, exist_ok=True)
        clean_temporaries(folder)
        name, content = settings
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
        purge = {} if resume_step is None else {"purge_step": resume_step + 1}
        self.writer = SummaryWriter(str(events or folder), **purge)

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.quiet:
            tqdm.write(line)
            sys.stdout.flush()
        if self._log is not None:
            print(line, file=self._log, flush=True)

    def record(self, kind: str, step: int, **values: float) -> None:
        """One record to metrics.jsonl, and each value to TensorBoard as ``kind/name``."""
        if self._metrics is None:
            return
        print(json.dumps({"kind": kind, "step": step, **values}), file=self._metrics, flush=True)
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Bring log and metrics to the disk, so that no checkpoint is ahead of its records."""
        for file in (self._log, self._metrics):
            if file is not None:
                os.fsync(file.fileno())

    def progress(self, total: int, initial: int) -> tqdm:
        """A bar over the steps, on a terminal only."""
        self.bar = tqdm(
            total=total, initial=initial, unit="step", disable=self.quiet or None, leave=False
        )
        return self.bar

    def close(self) -> None:
        for resource_ in (self.bar, self.writer, self._log, self._metrics):
            if resource_ is not None:
                resource_.close()
