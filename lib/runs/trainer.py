"""The training loop that all trainers share: update, log, validate, save, stop, resume."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.checkpoint import load_state, not_finite, save_atomic
from lib.runs.interrupts import Stopped
from lib.runs.memory import release_free_memory
from lib.runs.retention import save_newest
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, Run, last_good
from lib.runs.steps import Stepper
from lib.runs.training import (
    EvaluationStopped,
    check_checkpoint,
    random_states,
    restore_optimizer,
    restore_random_states,
    restore_stats,
    solver_figures,
    stats_state,
    summed_stats,
    warnings_in,
)

FORMAT = 2  # version of the checkpoint's format


class Trainer(Stepper):
    """Trains a model through both phases (stacked, equilibrium), logs, validates and saves.

    A signal or the time limit ends the run after a step, with all its state saved. ``state_dict``
    holds everything that the next step depends on, and the running means of the log. A run that
    was killed and resumed therefore equals an uninterrupted run bit for bit. On a GPU this needs
    :func:`~lib.runs.determinism.deterministic`; without it the two runs agree to rounding.

    The arguments are those of :class:`Stepper`.
    """

    weights_key = "model"  # the checkpoint's entry with the model's weights
    extra_parts: tuple[str, ...] = ()  # the checkpoint entries that ``extra_state`` adds

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.best: dict = {}  # phase, name, score and step of the best weights of the last phase
        self.unfinished = False  # True: the last step's validation is due but not done yet

    # ---- what subclasses define ----------------------------------------------------------------

    last_step: int
    pretrain_steps: int  # the length of the stacked phase

    def batches(self) -> Iterator[Any]:
        """Yield this process's share of each batch, from the current position to ``last_step``."""
        raise NotImplementedError

    def due(self) -> tuple[bool, bool, bool]:
        """Whether to log, to validate, and to save after the last step."""
        raise NotImplementedError

    def validate(self) -> tuple[Any, dict, str, float]:
        """Evaluate in the phase of the last update.

        Returns:
            The findings (passed to ``after_validation``); their values for metrics, plus ``text``
            for the log; the score's name; and the score (higher is better).
        """
        raise NotImplementedError

    def after_validation(self, found: Any) -> None:
        """Update what depends on the validation, such as a schedule or the epoch."""

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        """Return metrics values and a log line for the steps since the last log line."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        """Return the checkpoint entries of this trainer alone, named in ``extra_parts``."""
        raise NotImplementedError

    def load_extra(self, state: dict) -> None:
        """Restore what ``extra_state`` returned."""
        raise NotImplementedError

    def fixed(self) -> dict:
        """Return, by name, the settings that must not change between a save and a resume.

        With other values, the saved data position or optimiser state would have no meaning.
        """
        raise NotImplementedError

    def fixed_in(self, state: dict) -> dict:
        """Return these settings from a checkpoint, also from one older than a setting."""
        return state["fixed"]

    # ---- the loop ------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train up to ``last_step`` updates; log, validate and save when due.

        Raises:
            Stopped: a signal or the time limit ended the run; all its state is saved.
            TrainingError: too many steps in a row were not finite, or the weights are not finite.
        """
        self.run = run
        self.model.train()
        self._window_start = time.perf_counter()
        bar = run.progress(total=self.last_step, initial=self.step)
        with self.stopping, warnings_in(run.log):
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
        """Write the last log line and record of a run that is finished or was stopped."""
        counts = self.counts
        self.run.log(
            f"{self.step} steps | skipped {counts['skipped']} | diverged solves: forward "
            f"{counts['diverged_forward']}, backward {counts['diverged_backward']}"
        )
        self.run.record("summary", self.step, finished=finished, **counts)

    def _finish_step(self, validate: bool, save: bool, stop: bool) -> None:
        """Validate and save if due, then stop if asked.

        If the stop prevents a due validation, ``unfinished`` says so: the resumed run does it.
        """
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
        """Write one log line and one record: means over the steps since the previous line."""
        window, elapsed = self._window, time.perf_counter() - self._window_start
        values, line = self.figures(self.mean_loss(), elapsed)
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
        self.begin_window()

    def _validate(self) -> bool:
        """Validate and keep the best weights of the last phase; False if interrupted by a stop."""
        paused, states = time.perf_counter(), random_states(self.rng, self.gpus)
        try:
            found, record, name, score = self.validate()
        except EvaluationStopped:
            restore_random_states(states, self.rng, self.gpus)  # the resumed run validates again
            return False
        release_free_memory()  # otherwise the memory used by validation stays resident
        phase = "stacked" if 0 < self.step <= self.pretrain_steps else "equilibrium"
        self.run.log(f"step {self.step} | valid ({phase}) | {record.pop('text')}")
        self.run.record("valid", self.step, phase=phase, **record)
        # Scores of a stacked network and of an equilibrium are not comparable.
        if phase != self.best.get("phase") or not score <= self.best["score"]:
            self.best = {"phase": phase, "score": score, "step": self.step, "name": name}
            state = self.model.state_dict()
            self.processes.lead(lambda: self._write(lambda path: save_atomic(state, path), WEIGHTS))
        self.unfinished = False
        self.after_validation(found)
        self._window_start += time.perf_counter() - paused
        return True

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write the run's checkpoint, unless the model's weights are not finite."""
        state = self.state_dict()

        def write(path: Path) -> None:
            self.run.sync()
            save_newest(state, path, self.care.keep)

        self.processes.lead(lambda: self._write(write, CHECKPOINT))

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
                f"{error.filename or path} could not be written at step {self.step} "
                f"({error.strerror or error}): mend that, and {self.care.resume} continues the run"
                f"{last_good(self.run.folder)}"
            ) from error

    def state_dict(self) -> dict:
        """Return everything that the next step depends on, as tensors and plain containers."""
        own = random_states(self.rng, self.gpus), stats_state(self.model.deq.stats)
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
            # One entry per rank: each draws its own dropout masks and solves for its own samples.
            "random_states": list(states),
            "solver_stats": list(stats),
            **self.extra_state(),
        }

    @classmethod
    def check(cls, state: Any, source: Path) -> None:
        """Raise an InputError if ``state`` is not a checkpoint of this trainer."""
        parts = {
            *("fixed", "optimizer", "step", "best", "counts", "skipped_in_a_row", "unfinished"),
            *("window", "random_states", "solver_stats", cls.weights_key, *cls.extra_parts),
        }
        check_checkpoint(state, FORMAT, parts, source)

    def load_state_dict(self, state: dict, source: Path) -> list[str]:
        """Continue exactly where ``state`` was saved.

        Returns:
            Log lines that name what could not be restored.

        Raises:
            InputError: ``state`` has another format, or belongs to another model or to other
                settings (:meth:`fixed`).
        """
        self.check(state, source)
        for name, value in self.fixed().items():
            if (saved := self.fixed_in(state).get(name)) != value:
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
            restore_stats(stats[rank], self.model.deq.stats)
            return restore_random_states(states[rank], self.rng, self.gpus)
        self.rng.setstate(states[0]["random"])
        return [
            f"{here} process(es) continue what {before} began: dropout masks and vectors of the "
            "Jacobian loss come from new streams, and a solver stops by the samples of its process"
        ]
