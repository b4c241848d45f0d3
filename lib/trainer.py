"""The loop that all trainers share: step, log, validate, save, stop, go on.

What a step of which model computes is in the subclasses, in the rooms of words and images.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.checkpoint import load_state, not_finite, save_atomic
from lib.distributed import Processes
from lib.errors import InputError
from lib.experiment import CHECKPOINT, WEIGHTS, Run
from lib.memory import release_free_memory
from lib.retention import save_newest, versions
from lib.stopping import Stopped, Stopping
from lib.training import (
    PASSES,
    EvaluationStopped,
    TrainingError,
    check_checkpoint,
    random_states,
    restore_optimizer,
    restore_random_states,
    restore_stats,
    solver_figures,
    stats_state,
    summed_stats,
)

FORMAT = 2  # of the checkpoint
_DIVERGED_SHOWN = 20  # lines of the log about solves that diverged; the metrics have them all


@dataclass(frozen=True)
class Care:
    """How a run is kept alive.

    Attributes:
        keep: checkpoints kept, the newest among them.
        max_skipped: so many steps in a row that are not finite end the run.
        clip: largest gradient norm; 0 or less does not clip.
        weight_decay: the optimiser's, also after a resume.
        resume: what continues a run, such as '--restart', for messages.
        way_out: what helps against numbers that are not finite, likewise.
    """

    keep: int
    max_skipped: int
    clip: float
    weight_decay: float
    resume: str
    way_out: str


@dataclass(frozen=True)
class Choices:
    """What is drawn for a step, alike in all processes. A ``jac_weight`` of 0 takes no Jacobian
    loss."""

    f_thres: int
    jac_weight: float


class Trainer:
    """Trains a model with an equilibrium (``model.deq``) through both phases, and keeps it safe.

    A step whose loss or gradient is not finite changes nothing: it is skipped, counted and logged.
    A signal or the time limit ends the run after a step, with all its state saved. ``state_dict``
    holds all that the next step depends on, and the running means of the log: a run that was
    killed and resumed repeats, bit for bit, the one that was not.

    Args:
        model: on ``device``.
        optimizer: of all its parameters.
        device: of this process.
        processes: of the run; they share every batch and take every step together.
        seed: of the choices of a step that are not the model's.
        care: see there.
        stopping: collects the wish to stop.
    """

    weights_key = "model"  # the checkpoint's entry with the model's weights
    extra_parts: tuple[str, ...] = ()  # the entries that ``extra_state`` adds
    extra_sums: tuple[str, ...] = ()  # figures that ``part`` gives beside the losses

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        processes: Processes,
        *,
        seed: int,
        care: Care,
        stopping: Stopping,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.processes, self.care, self.stopping = processes, care, stopping
        self.parallel = processes.replicate(model, device)
        self.clipped = list(model.parameters())
        self.rng = random.Random(seed)
        self.step = 0
        self.best: dict = {}  # phase, name, score and step of the best weights of the last phase
        self.counts = {"skipped": 0, "diverged_forward": 0, "diverged_backward": 0}
        self.skipped_in_a_row = 0
        self.unfinished = False  # the validation of the last step is still to come
        self.run = Run(None, ("", ""), quiet=True)
        # What a forward changes in a model: the statistics of batch norm.
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._reset_window()

    # ---- what subclasses define ----------------------------------------------------------------

    last_step: int
    stacked: bool  # whether the next step is one of the stacked phase

    def batches(self) -> Iterator[Any]:
        """This process's shares of the batches from the present position up to ``last_step``."""
        raise NotImplementedError

    def draw(self) -> Choices:
        """Make the random choices of a step; as many draws in either phase."""
        raise NotImplementedError

    def split(self, batch: Any) -> Sequence[Any]:
        """The parts of a share that go through the model one after another."""
        raise NotImplementedError

    def part(self, index: int, part: Any, choices: Choices) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One forward: its summand of the batch's mean loss, and of the mean Jacobian loss; and
        the summands of ``extra_sums``. All 0-dim; over parts and processes they add up."""
        raise NotImplementedError

    def set_learning_rate(self) -> None:
        """Set the rate of the update to come."""
        raise NotImplementedError

    def advance(self, batch: Any) -> None:
        """Move the position in the data past ``batch``."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what else a step that is skipped may have spoilt."""

    def due(self) -> tuple[bool, bool, bool]:
        """Whether to log, to validate, and to save after the last step."""
        raise NotImplementedError

    def validate(self) -> tuple[Any, dict, str, float]:
        """Evaluate in the phase of the last update: the findings, their record, the name of the
        score, and the score, the higher the better."""
        raise NotImplementedError

    def after_validation(self, found: Any) -> None:
        """Tell a schedule, turn an epoch."""

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        """Values for metrics and words for the log, of the steps since the last line."""
        raise NotImplementedError

    def jac_weight_of(self, step: int) -> float:
        """Weight of the Jacobian loss in update ``step``."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        """What the checkpoint has beside what all trainers save: ``extra_parts``."""
        raise NotImplementedError

    def load_extra(self, state: dict) -> None:
        """Put back what ``extra_state`` returned."""
        raise NotImplementedError

    def fixed(self) -> dict:
        """Settings without which a position or an optimiser's state mean nothing, by name."""
        raise NotImplementedError

    # ---- a step --------------------------------------------------------------------------------

    def update(self, batch: Any) -> bool:
        """One optimiser step on this process's share of a batch; whether the run is to stop.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        choices, broken = self.draw(), self._broken()
        for buffer, kept in self._buffers:
            kept.copy_(buffer)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.split(batch)
        sums = torch.zeros(2 + len(self.extra_sums), dtype=torch.float64, device=self.device)
        for i, part in enumerate(parts):
            with self._gradients_stay(i < len(parts) - 1):
                loss, jac_loss, extra = self.part(i, part, choices)
                total = loss + choices.jac_weight * jac_loss if choices.jac_weight else loss
                # DistributedDataParallel averages, but the losses of the processes add up.
                (total * self.processes.world_size).backward()
            sums += torch.stack([x.detach().double() for x in (loss, jac_loss, *extra)])
        norm = self._clip()
        events = [
            self.stopping.check(),
            *(b - a for a, b in zip(broken, self._broken(), strict=True)),
        ]
        events = torch.tensor(events, dtype=torch.float64).to(self.device, non_blocking=True)
        sums = self.processes.sum(torch.cat([sums, events]))
        # The step's one wait for the device, beside the solvers'.
        *sums, stop, diverged_f, diverged_b, norm = torch.cat([sums, norm[None].double()]).tolist()
        loss, jac_loss, *extra = sums
        self.set_learning_rate()
        finite = math.isfinite(loss + jac_loss + norm)
        if finite:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip()
        self.step += 1
        self.advance(batch)
        window = self._window
        window["steps" if finite else "skipped"] += 1
        if finite:
            window["loss"] += loss
            if choices.jac_weight:
                window["jac_loss"] += jac_loss
                window["jac_count"] += 1
        for name, value in zip(self.extra_sums, extra, strict=True):
            window[name] += value
        if diverged_f or diverged_b:
            self._report_diverged(broken)
        if not finite:
            self._report_skipped(loss + jac_loss, norm)
        return stop > 0

    def _gradients_stay(self, stay: bool):
        """Gradients travel to the other processes once a step, with the last part."""
        if stay and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """The norm of all gradients, 0-dim, before those of ``clipped`` are scaled down."""
        norms, clipped = [], set()
        if self.care.clip > 0:
            norms = [nn.utils.clip_grad_norm_(self.clipped, self.care.clip)]
            clipped = {id(p) for p in self.clipped}
        norms += [
            torch.linalg.vector_norm(p.grad)
            for p in self.model.parameters()
            if p.grad is not None and id(p) not in clipped
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _skip(self) -> None:
        """Leave an update out."""
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        self.forget()
        self.counts["skipped"] += 1
        self.skipped_in_a_row += 1

    def _report_skipped(self, loss: float, norm: float) -> None:
        self.run.log(
            f"step {self.step} | skipped: the loss is {loss:.4g}, the gradient norm {norm:.4g}"
        )
        self.run.record("skipped", self.step, loss=loss, gradient_norm=norm)
        if self.skipped_in_a_row >= self.care.max_skipped:
            self._give_up(f"{self.skipped_in_a_row} steps in a row were not finite, the last one")

    def _broken(self) -> list[int]:
        return [getattr(self.model.deq.stats, which).broken for which in PASSES]

    def _report_diverged(self, before: list[int]) -> None:
        """Name the solves of the last step that diverged, in any process."""
        found = []
        for which, old, new in zip(PASSES, before, self._broken(), strict=True):
            if new > old:
                last = getattr(self.model.deq.stats, which).last_broken
                found += [(which, last["rel_residual"], last["nfe"])] * (new - old)
        for rank, solves in enumerate(self.processes.gather(found)):
            for which, residual, nfe in solves:
                self.counts[f"diverged_{which}"] += 1
                values = {"pass": which, "rel_residual": residual, "nfe": nfe, "rank": rank}
                self.run.record("diverged", self.step, **values)
                shown = self.counts["diverged_forward"] + self.counts["diverged_backward"]
                if shown <= _DIVERGED_SHOWN:
                    self.run.log(
                        f"step {self.step} | the {which} solver diverged: relative residual "
                        f"{residual:.2e} after {nfe} evaluations"
                        + (f" in process {rank}" if self.processes.world_size > 1 else "")
                        + (" (the last line on this)" if shown == _DIVERGED_SHOWN else "")
                    )

    # ---- the loop ------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train up to ``last_step`` updates, validating and saving on the way.

        Raises:
            Stopped: by a signal or the time limit; all is saved.
            TrainingError: too many steps in a row were not finite, or the weights are not.
        """
        self.run = run
        self.model.train()
        self._window_start = time.perf_counter()
        bar = run.progress(total=self.last_step, initial=self.step)
        with self.stopping:
            if self.unfinished:
                self._finish_step(validate=True, save=True, stop=False)
            for batch in self.batches():
                stop = self.update(batch)
                bar.update()
                log, validate, save = self.due()
                if log:
                    self._log()
                self._finish_step(validate, save, stop)

    def summarise(self, *, finished: bool = True) -> None:
        """The last line and record of a run, or of a part of it that was stopped."""
        counts = self.counts
        self.run.log(
            f"{self.step} steps | skipped {counts['skipped']} | diverged solves: forward "
            f"{counts['diverged_forward']}, backward {counts['diverged_backward']}"
        )
        self.run.record("summary", self.step, finished=finished, **counts)

    def _finish_step(self, validate: bool, save: bool, stop: bool) -> None:
        """Validate and save, as far as due; a validation that the stop forestalls is noted."""
        if validate:
            self.unfinished = True
            stop = stop or not self._validate()
        if validate or save or stop:
            self.save()
        if stop:
            reasons = self.processes.gather((self.stopping.reason, self.stopping.code))
            reason, code = next(found for found in reasons if found[0])
            self.run.log(f"stopped by {reason} at step {self.step}: all is saved")
            self.summarise(finished=False)
            raise Stopped(f"stopped by {reason} at step {self.step}", code)

    def _log(self) -> None:
        """One line and one record of the means since the last one."""
        window, elapsed = self._window, time.perf_counter() - self._window_start
        loss = window["loss"] / window["steps"] if window["steps"] else math.nan
        values, line = self.figures(loss, elapsed)
        solver, words = solver_figures(summed_stats(self.model.deq.stats, self.processes))
        values |= solver
        line += words
        if window["jac_count"]:
            values["jac_loss"] = window["jac_loss"] / window["jac_count"]
            values["jac_loss_weight"] = self.jac_weight_of(self.step - 1)
            line += f" | jac {values['jac_loss']:.3f} x {values['jac_loss_weight']:.2f}"
        if window["skipped"]:
            values["skipped"] = window["skipped"]
            line += f" | skipped {window['skipped']}"
        self.run.log(line)
        self.run.record("train", self.step, **values)
        self._reset_window()

    def _validate(self) -> bool:
        """Validate and keep the best weights of the last phase; False if it was broken off."""
        paused, states = time.perf_counter(), random_states(self.rng, self.device)
        try:
            found, record, name, score = self.validate()
        except EvaluationStopped:
            restore_random_states(states, self.rng, self.device)  # it will come again
            return False
        release_free_memory()  # else what it used would stay resident
        phase = record["phase"]
        self.run.log(f"step {self.step} | valid ({phase}) | {record.pop('text')}")
        self.run.record("valid", self.step, **record)
        # A stacked network and an equilibrium are compared with their own kind.
        if phase != self.best.get("phase") or not score <= self.best["score"]:
            self.best = {"phase": phase, "score": score, "step": self.step, "name": name}
            state = self.model.state_dict()
            self.processes.lead(lambda: self._write(lambda path: save_atomic(state, path), WEIGHTS))
        self.unfinished = False
        self.after_validation(found)
        self._window_start += time.perf_counter() - paused
        return True

    def _reset_window(self) -> None:
        names = ("loss", "jac_loss", *self.extra_sums)
        self._window = dict.fromkeys(names, 0.0) | {"jac_count": 0, "steps": 0, "skipped": 0}
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of the run, unless its weights are no longer finite."""
        state = self.state_dict()
        self.run.sync()
        self.processes.lead(
            lambda: self._write(lambda path: save_newest(state, path, self.care.keep), CHECKPOINT)
        )

    def _write(self, write, name: str) -> None:
        if self.run.folder is None:
            return
        if bad := not_finite(self.model.state_dict()):
            self._give_up(f"weights are not finite ({', '.join(bad)})")
        path = self.run.folder / name
        try:
            write(path)
        except OSError as error:
            raise InputError(
                f"{path} could not be written at step {self.step} ({error.strerror or error}): "
                f"mend that, and {self.care.resume} continues the run{self._last_good()}"
            ) from error

    def _give_up(self, trouble: str) -> NoReturn:
        raise TrainingError(
            f"{trouble} at step {self.step}: {self.care.way_out}{self._last_good()}"
        )

    def _last_good(self) -> str:
        """The end of a message that names the last good state."""
        folder = self.run.folder
        if folder is None or not versions(folder / CHECKPOINT):
            return ""
        return f"; the last good state is {folder / CHECKPOINT}"

    def state_dict(self) -> dict:
        """All that the next step depends on: tensors and plain containers."""
        own = random_states(self.rng, self.device), stats_state(self.model.deq.stats)
        states, stats = zip(*self.processes.gather(own), strict=True)
        return {
            "format": FORMAT,
            "fixed": self.fixed(),
            self.weights_key: self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "counts": self.counts,
            "skipped_in_a_row": self.skipped_in_a_row,
            "unfinished": self.unfinished,
            "window": self._window,
            # By process: each draws its own dropout masks, and solves for its own samples.
            "random_states": list(states),
            "solver_stats": list(stats),
            **self.extra_state(),
        }

    @classmethod
    def check(cls, state: Any, source: Path) -> None:
        """Refuse what is not a checkpoint of this trainer."""
        parts = {
            *("fixed", "optimizer", "step", "best", "counts", "skipped_in_a_row", "unfinished"),
            *("window", "random_states", "solver_stats", cls.weights_key, *cls.extra_parts),
        }
        check_checkpoint(state, FORMAT, parts, source)

    def load_state_dict(self, state: dict, source: Path) -> list[str]:
        """Continue exactly where ``state`` was taken; lines that say what cannot be as it was.

        Raises:
            InputError: a checkpoint of another format, of another model, or of other batches.
        """
        self.check(state, source)
        for name, value in self.fixed().items():
            if (saved := state["fixed"].get(name)) != value:
                raise InputError(
                    f"{source} was saved with {name} {saved}, and this run has {value}: continue "
                    "with the former"
                )
        load_state(self.model, state[self.weights_key], str(source))
        restore_optimizer(self.optimizer, state["optimizer"], self.care.weight_decay)
        self.step, self.best, self.counts = state["step"], state["best"], state["counts"]
        self.skipped_in_a_row, self.unfinished = state["skipped_in_a_row"], state["unfinished"]
        self._window = state["window"]
        self.load_extra(state)
        return self._load_by_process(state["random_states"], state["solver_stats"])

    def _load_by_process(self, states: list[dict], stats: list) -> list[str]:
        rank, here, before = self.processes.rank, self.processes.world_size, len(states)
        if here == before:
            restore_random_states(states[rank], self.rng, self.device)
            restore_stats(stats[rank], self.model.deq.stats)
            return []
        self.rng.setstate(states[0]["random"])
        return [
            f"{here} process(es) continue what {before} began: dropout masks and vectors of the "
            "Jacobian loss come from new streams, and a solver stops by the samples of its process"
        ]
