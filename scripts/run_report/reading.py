"""Read a run's folder: records, settings, log and audit, whatever of them is there."""

import json
import math
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lib.errors import InputError, is_number, needs
from lib.runs.figures import series
from lib.runs.run_folder import LOG, METRICS, SETTINGS, read_metrics

CONFIG = "config.yaml"  # the settings of an image model's run
AUDIT = "audit.json"
COMMANDS_REPORT = "report.txt"  # what a quickstart prints at its end
PICTURES = ("scenes.png",)  # that a command draws of its predictions
_TOLERANCE = 1e-3  # of the models' solvers, where the settings name none
_CHARACTERS = ("enwik8", "text8")
_LONGEST = 20_000  # characters of a command's own report
_NOTES = 12  # most lines of the log on warnings, starts and stops
_LARGEST = 1e305  # a number beyond it has no place on an axis


@dataclass(frozen=True)
class Score:
    """The figure by which a run is judged."""

    name: str  # for people
    train: str  # its key in the training records, "" without one
    valid: str  # its key in the records of validations
    lower_is_better: bool
    percent: bool = False

    def value(self, record: dict, key: str) -> float:
        """The score of a record; NaN if the record lacks it."""
        found = record.get(key)
        if not is_number(found):
            return math.nan
        return found / math.log(2) if self.name == BITS else float(found)

    def text(self, value: float) -> str:
        """A value as people write it."""
        if self.percent:
            return f"{100 * value:.2f}\N{NO-BREAK SPACE}%"
        return f"{value:.3f}" if self.name == BITS else f"{value:.2f}"


BITS = "bits per character"
SCORES = {
    "words": Score("perplexity", "perplexity", "perplexity", True),
    "characters": Score(BITS, "loss", "loss", True),
    "state tracking": Score("strings with all answers right", "", "exact", False, True),
    "scenes": Score("mean IoU", "", "mIoU", False, True),
    "pictures": Score("accuracy", "accuracy", "top1", False, True),
}


@dataclass
class TrainingRun:
    """What the files of a run say.

    Attributes:
        folder, name: where they lie; a name that no other run of the report has.
        records: those of metrics.jsonl, oldest first; ``damaged`` lines of it cannot be read.
        settings: by name; sections of a yaml file are joined by dots.
        log: the lines of log.txt.
        audit: the content of audit.json; {} without one.
    """

    folder: Path
    name: str
    records: list[dict]
    damaged: int
    settings: dict
    log: list[str]
    audit: dict
    _series: dict = field(default_factory=dict, repr=False)

    # ---- what kind of run it is ----------------------------------------------------------------

    @cached_property
    def kind(self) -> str:
        """The kind of the data: a key of SCORES."""
        settings = self.settings
        if "DATASET.DATASET" in settings or (self.folder / CONFIG).is_file():
            names = {key for record in self.of_kind("valid") for key in record}
            scenes = "mIoU" in names or settings.get("DATASET.DATASET") in (
                *("cityscapes", "digit_scenes", "own_scenes"),
            )
            return "scenes" if scenes and "top1" not in names else "pictures"
        dataset = str(settings.get("dataset"))
        if dataset.startswith("state:"):
            return "state tracking"
        characters = settings.get("characters") is True or dataset in _CHARACTERS
        return "characters" if characters else "words"

    @property
    def score(self) -> Score:
        return SCORES[self.kind]

    @property
    def data(self) -> str:
        """The name of the data set."""
        return str(self.setting("DATASET.DATASET", "dataset", otherwise="unknown data"))

    def setting(self, *names: str, otherwise=None):
        """The first of these settings that the run has."""
        return next((self.settings[n] for n in names if n in self.settings), otherwise)

    @property
    def border(self) -> int:
        """The first step at equilibrium."""
        found = self.setting("pretrain_steps", "TRAIN.PRETRAIN_STEPS", otherwise=0)
        return found if type(found) is int else 0

    @property
    def solver(self) -> str:
        return str(self.setting("f_solver", "DEQ.F_SOLVER", otherwise="anderson"))

    @property
    def tolerance(self) -> float:
        """The relative or absolute residual below which the forward solver stops."""
        found = re.search(r"\beps=([0-9.eE+-]+)", self.solver)
        try:
            return float(found[1]) if found else _TOLERANCE
        except ValueError:
            return _TOLERANCE

    @property
    def stop_mode(self) -> str:
        found = self.setting("stop_mode", "DEQ.STOP_MODE", otherwise="rel")
        return found if found in ("abs", "rel") else "rel"

    # ---- records -------------------------------------------------------------------------------

    def of_kind(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of ``name`` in the records of ``kind``, the last of each step."""
        if (kind, name) not in self._series:  # long runs have many records, and many ask for them
            steps, values = series(self.records, kind, name)
            last = {s: v for s, v in zip(steps, values, strict=True) if abs(v) < math.inf}
            self._series[kind, name] = list(last), list(last.values())
        return self._series[kind, name]

    def scores(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and scores of the records of ``kind``."""
        steps, values = self.series(kind, key) if key else ([], [])
        return steps, [self.score.value({key: value}, key) for value in values]

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def planned_steps(self) -> int | None:
        """The number of steps that the settings ask for; None where the data decide it."""
        found = self.settings.get("max_step")
        return found if type(found) is int else None

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        ends = self.of_kind("summary")
        # A run that goes on has records after the end of an earlier part.
        if ends and ends[-1] is self.records[-1]:
            done = "finished" if ends[-1]["finished"] else "stopped early"
            return f"{done} after {self.last_step:,} steps"
        planned = f" of {self.planned_steps:,}" if self.planned_steps else ""
        path = self.folder / METRICS
        age = time.time() - path.stat().st_mtime if path.is_file() else math.nan
        return (
            f"at step {self.last_step:,}{planned}: no end is recorded, so the run is going on or "
            f"was killed (last record {ago(age)})"
        )

    @cached_property
    def best(self) -> dict | None:
        """The record of the best validation of the last phase that has one."""
        found = [r for r in self.of_kind("valid") if is_number(r.get("loss"))]
        found = [r for r in found if r["phase"] == found[-1]["phase"]]
        # The trainer ranks the weights of state tracking by the loss.
        key = "loss" if self.kind == "state tracking" else self.score.valid
        ranked = [r for r in found if is_number(r.get(key)) and math.isfinite(r[key])]
        if not ranked:
            return None
        sign = 1 if self.score.lower_is_better or key == "loss" else -1
        return min(ranked, key=lambda record: sign * record[key])

    def final(self, split: str) -> dict | None:
        """The last evaluation of a split after training; of images, that of the best weights."""
        found = self.of_kind(f"final_{split}")
        best = [r for r in found if r.get("weights", "best") == "best"]
        return (best or found or [None])[-1]

    # ---- what only the log says ----------------------------------------------------------------

    def said(self, pattern: str) -> list[re.Match]:
        """The matches of a pattern at the beginnings of the log's lines."""
        return [found for line in self.log if (found := re.match(pattern, line))]

    @cached_property
    def step_times(self) -> dict[int, float]:
        """Milliseconds per step, by the last step of the mean; validations do not count."""
        said = self.said(r"(?:epoch .*?\| )?step (\d+) \|.*\| (\d+) ms/step")
        return {int(found[1]): float(found[2]) for found in said}

    @property
    def seconds(self) -> float:
        """The time of all steps together, without validations; NaN if the log does not say it."""
        steps = sorted(self.step_times)
        if not steps:
            return math.nan
        lengths = [b - a for a, b in zip([0, *steps], steps, strict=False)]
        return sum(n * self.step_times[s] for n, s in zip(lengths, steps, strict=True)) / 1000

    @property
    def memory(self) -> float:
        """The largest peak of memory that is known, in MiB; NaN without one."""
        found = [float(m[1]) for m in self.said(r"peak memory (\d+) MiB")]
        return max([*found, *self.series("train", "memory_mib")[1]], default=math.nan)

    @cached_property
    def radius(self) -> tuple[float, str]:
        """A mean spectral radius and where it is from: the audit, validation, or the command."""
        found = self.audit.get("radius")
        found = found.get("mean") if isinstance(found, dict) else None
        if is_number(found) and math.isfinite(found):
            return float(found), "audit"
        if values := self.series("valid", "sradius")[1]:
            return values[-1], "last validation"
        if said := re.search(r"^spectral radius \((.*?)\) +(\d+\.\d+)", self.own_report, re.M):
            return float(said[2]), f"{COMMANDS_REPORT}, {said[1]}"
        return math.nan, ""

    @cached_property
    def own_report(self) -> str:
        """What the training command printed at its end, "" without it."""
        path = self.folder / COMMANDS_REPORT
        return path.read_text("utf-8", errors="replace")[:_LONGEST] if path.is_file() else ""

    @property
    def environment(self) -> dict[str, str]:
        """Command, versions, device and data, as the log has them, of the last start."""
        found = {}
        for label, pattern in (
            ("started", r"started (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d): "),
            ("command", r"started \S+ \d\d:\d\d:\d\d: (.*)"),
            ("software", r"(torch \S+, Python \S+)$"),
            ("parameters", r"(\d+) parameters \|"),
            ("device", r"\d+ parameters \| (.*?) \|"),
            ("processes", r"\d+ parameters \| .*? \| (.*)"),
        ):
            if said := self.said(pattern):
                found[label] = said[-1][1]
        numbers = [i for i, line in enumerate(self.log) if re.match(r"\d+ parameters \|", line)]
        if numbers and numbers[-1] > 0:
            found["data"] = self.log[numbers[-1] - 1]
        if "parameters" in found:
            found["parameters"] = f"{int(found['parameters']):,}"
        return found

    @property
    def notes(self) -> list[str]:
        """Lines of the log on warnings, restarts and stops, each once."""
        lines = (m[0] for m in self.said(r"(warning: |stopped by|continuing |an error ends).*"))
        return list(dict.fromkeys(lines))[-_NOTES:]


def ago(seconds: float) -> str:
    """A past time in words."""
    if not seconds < math.inf:
        return "never"
    return f"{in_words(max(seconds, 0))} before this report"


def in_words(seconds: float) -> str:
    """A duration in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def read_runs(folders: list[Path]) -> list[TrainingRun]:
    """Read all runs; their names are the ends of their paths that tell them from each other.

    Raises:
        InputError: a folder holds no run, or stands twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder} stands twice: name each run once")
    return [_read(f, n) for f, n in zip(folders, _names(paths), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> TrainingRun:
    settings = _settings(folder)
    path = folder / METRICS
    records = [_drawable(r) for r in read_metrics(folder) if abs(r["step"]) < _LARGEST]
    if settings is None and not path.is_file():
        raise InputError(
            f"{folder} holds no training run: expected a folder with metrics.jsonl, as training "
            "leaves it"
        )
    lines = path.read_bytes().splitlines() if path.is_file() else []
    log = folder / LOG
    return TrainingRun(
        folder,
        name,
        records,
        len(lines) - len(records),
        settings or {},
        log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else [],
        _audit(folder / AUDIT),
    )


def _drawable(record: dict) -> dict:
    """The record with NaN for numbers that are too large for a float or an axis."""
    large = [k for k, v in record.items() if type(v) in (int, float) and abs(v) > _LARGEST]
    return record | dict.fromkeys(large, math.nan) if large else record


def _settings(folder: Path) -> dict | None:
    """The settings by name; None without a file of them."""
    if (path := folder / SETTINGS).is_file():
        with needs("words"):
            from deq_sequence.own_settings import read_saved
        return read_saved(path)
    if (path := folder / CONFIG).is_file():
        with needs("images"):
            from mdeq_vision.yaml_files import read_yaml
        found = read_yaml(path, most=20_000)
        if not isinstance(found, dict):
            raise InputError(f"{path} holds no settings of a run: restore or delete it")
        return dict(_flat(found))
    return None


def _flat(section, prefix: str = ""):
    """Names, with dots, and values of a nested dict."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _audit(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"), parse_int=float)  # of any number of digits
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): restore or delete it") from error
    if not isinstance(found, dict) or not isinstance(found.get("verdict"), str):
        raise InputError(f"{path} holds no audit: restore or delete it")
    return found
