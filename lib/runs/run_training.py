"""A training command: read the checkpoint, build, open the folder, train, finish."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib.errors import InputError, naming
from lib.runs.checkpoint import load
from lib.runs.interrupts import Stopped, TrainingError
from lib.runs.processes import Processes, lost_contact
from lib.runs.retention import load_newest, set_aside
from lib.runs.run_folder import (
    CHECKPOINT,
    WEIGHTS,
    Run,
    check_unused,
    new_folder,
    own,
    peak_memory_mib,
)
from lib.runs.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """What a training command decides before it builds a model."""

    trainer: type[Trainer]
    folder: Path  # of the run
    checkpoint: Path | None  # the newest of the run to continue; None begins a new run
    named_by: str  # the option that chose ``checkpoint``
    used: str  # advice to a new run whose folder holds a run
    anew: bool = False  # a new run may use the folder of one without a checkpoint
    unnamed: bool = False  # a new run takes another name if the folder exists
    debug: bool = False  # write nothing
    events: Path | None = None  # folder of the TensorBoard events; None means ``folder``

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on writing in the folder of its checkpoint."""
        return self.checkpoint == self.folder / CHECKPOINT and not self.debug


@dataclass(frozen=True)
class Settings:
    """The settings of a run by name, and their file in its folder."""

    values: dict
    file: str
    content: str
    read: Callable[[Path], dict]  # reads such a file; raises an InputError if it is unreadable
    free: tuple[str, ...]  # beginnings of names: a resumed run may change these without a note
    first: tuple[str, ...]  # these have an effect on a new run only
    beside: tuple[tuple[str, str], ...] = ()  # names and contents of other files of the run

    def changes(self, path: Path) -> list[str]:
        """One line per setting that differs in ``path``; an error if it is one of ``first``."""
        if not path.is_file():
            return [f"{path} is missing, so the settings could not be compared"]
        before = self.read(path)
        changed = [k for k, v in self.values.items() if k in before and before[k] != v]
        for name in changed:
            if name.startswith(self.first):
                raise InputError(
                    f"{name} {self.values[name]!r} has no effect on a run that goes on: it began "
                    f"with {before[name]!r}, so leave that"
                )
        return [
            f"changed since the checkpoint: {name} from {before[name]!r} to {self.values[name]!r}"
            for name in changed
            if not name.startswith(self.free)
        ]


@dataclass(frozen=True)
class Job:
    """What a training command has built."""

    trainer: Trainer  # in its initial state
    settings: Settings
    title: str  # the first lines of the log: the data and the model
    notes: list[str] = field(default_factory=list)  # further lines
    finish: Callable[[Run], None] = lambda run: None  # called after the last step


def run_training(plan: Plan, build: Callable[[bool], Job], processes: Processes) -> Path | None:
    """Train in a new run, or continue that of a checkpoint. Every process makes this call.

    ``build(anew)`` builds the job; ``anew`` is False if a checkpoint gives the weights.

    Returns:
        The run's folder; None in a debug run and in other processes than the first.

    Raises:
        InputError: the folder has another owner or holds a run; the checkpoint does not fit.
        Stopped, TrainingError: as :meth:`~lib.runs.trainer.Trainer.train`.
    """
    state, source, lines = None, None, []
    with contextlib.ExitStack() as locks:
        if plan.goes_on:
            # First of all: the owner may be about to write a newer checkpoint.
            lines += processes.lead(lambda: _own(plan.folder, locks))
        if plan.checkpoint is not None:
            with naming(plan.named_by):
                state, source, said = _read_checkpoint(plan.checkpoint, plan.trainer, processes)
            lines += said
        job = build(state is None)
        trainer, settings = job.trainer, job.settings
        lines += job.notes
        if state is not None:
            lines += settings.changes(plan.checkpoint.parent / settings.file)
            lines += trainer.load_state_dict(state, source)
            lines.append(f"continuing {source} at step {trainer.step}")
        trainer.try_validation()
        if not processes.lead((plan.folder / WEIGHTS).exists):
            trainer.best = {}  # the best weights are in another run's folder
        step = None if state is None else trainer.step
        begun = processes.lead_keeps(lambda: _begin(plan, settings, source, step, locks))
        run, device = begun or Run.silent(), trainer.device
        locks.callback(run.close)
        try:
            run.log(f"started {time.strftime('%F %T')}: {shlex.join(sys.argv)}")
            run.log(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
            run.log(job.title)
            run.log(
                f"{sum(p.numel() for p in trainer.model.parameters())} parameters | "
                f"{device}{trainer.gpus or ''} | "
                f"{processes.world_size} process(es) of {torch.get_num_threads()} threads"
            )
            run.log("debug: nothing is written" if plan.debug else f"run folder {run.folder}")
            for line in lines:
                run.log(line)
            trainer.train(run, job.finish)
            trainer.summarise()
            run.log(f"peak memory {peak_memory_mib(device):.0f} MiB")
            processes.lead(run.sync)
        except (Stopped, KeyboardInterrupt) as error:
            why, code = str(error) or "interrupted", getattr(error, "code", 130)
            hint = "" if plan.debug else f" ({trainer.care.resume} continues the run)"
            raise Stopped(why + hint, code) from None
        except Exception as error:
            if (lost := lost_contact(error)) and not plan.debug:
                raise TrainingError(
                    f"lost the other processes ({lost}): start all of them again, "
                    f"{trainer.care.resume} continues the run"
                ) from error
            raise
    return run.folder


def _own(folder: Path, locks: contextlib.ExitStack) -> list[str]:
    """Own ``folder`` until ``locks`` is closed; return log lines."""
    lock = own(folder)
    if lock is None:
        return [f"warning: {folder} is on a file system without locks: start one run in it"]
    locks.enter_context(lock)
    return []


def _begin(
    plan: Plan,
    settings: Settings,
    source: Path | None,
    step: int | None,
    locks: contextlib.ExitStack,
) -> Run:
    """Open the run's folder; set aside checkpoints newer than the one read."""
    kept, folder, lines = (settings.file, settings.content), plan.folder, []
    if plan.debug:
        return Run(None, kept, step)
    if not plan.goes_on:
        if plan.events is not None:  # before the lock: a failure leaves nothing behind
            plan.events.mkdir(parents=True, exist_ok=True)
        folder = new_folder(folder) if plan.unnamed else folder
        lines = _own(folder, locks)
        check_unused(folder, plan.used, anew=plan.anew)  # no other run can begin here from now on
    run = Run(folder, kept, step, events=plan.events, beside=settings.beside)
    for line in lines:
        run.log(line)
    if plan.checkpoint in (None, folder / CHECKPOINT):
        set_aside(folder / CHECKPOINT, source or folder / CHECKPOINT)
    return run


def _read_checkpoint(
    path: Path, trainer: type[Trainer], processes: Processes
) -> tuple[dict, Path, list[str]]:
    """Content and file of the newest good checkpoint, lines for the log."""
    lines: list[str] = []
    found = processes.lead_keeps(lambda: load_newest(path, trainer.check, lines.append))
    used, lines = processes.lead(lambda: (found[1], lines))
    if found:
        return found[0], used, lines
    try:
        return load(used), used, lines
    except InputError as error:
        raise InputError(
            f"process {processes.rank} cannot read what the first one reads: {error} (all machines "
            "need the run's folder on a file system that they share)"
        ) from error
