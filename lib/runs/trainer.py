"""The trainer of all tasks: updates, logs, validates, saves, stops, resumes."""

import contextlib
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.errors import DEQWarning, InputError, naming
from lib.runs.checkpoint import (
    check_form,
    check_plain,
    check_tensors,
    load_state,
    not_finite,
    save_atomic,
)
from lib.runs.determinism import check_random_states, random_states, restore_random_states
from lib.runs.evaluation_loop import EvaluationStopped, release_free_memory
from lib.runs.figures import (
    broken_since,
    broken_solves,
    check_stats,
    report_diverged,
    restore_stats,
    solver_figures,
    stats_state,
    summed_stats,
)
from lib.runs.interrupts import Stopped, Stopping, TrainingError, memory_for
from lib.runs.optimizers import clip_gradients, restore_optimizer
from lib.runs.processes import Processes, lost_contact
from lib.runs.retention import save_newest
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, Run, last_good, peak_memory_mib, warnings_in
from lib.runs.task import Care, Choices, Task

FORMAT = 2  # version of the checkpoint's format
_COUNTS = ("skipped", "diverged_forward", "diverged_backward")


def _comparable(score: float) -> float:
    """The score; one that is not finite is below every number."""
    return score if math.isfinite(score) else -math.inf


class Trainer(Task):
    """Trains a DEQ model (``model.deq``) through both phases (stacked, equilibrium).

    A signal or the time limit ends the run after a step, with its state saved: all that the next
    step depends on, and the running means of the log. So a resumed run equals an uninterrupted one
    bit for bit; on a GPU this needs :func:`~lib.runs.determinism.deterministic`.

    Args:
        model, optimizer: the model, on ``device``, and the optimiser of all its parameters.
        processes: the processes of the run; they share every batch and take every step together.
        seed: seed of :meth:`draw`, the choices made outside the model.
        care, stopping: how the run is protected; requests to stop.
    """

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
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.skipped_in_a_row = 0
        self.run = Run.silent()
        self.best: dict = {}  # phase, name, score and step of the best weights of the last phase
        self.unfinished = False  # True: the last step's validation is due but not done yet
        self._whole = True  # False: an update has changed a part of the state
        self.begin_window()

    # ---- a step --------------------------------------------------------------------------------

    def update(self, batch: Any) -> bool:
        """Take one optimiser step on this process's share of a batch.

        All processes skip it if its loss or gradient is not finite in any of them: model and
        optimiser are then unchanged.

        Returns:
            Whether the run should stop, the same in all processes.

        Raises:
            TrainingError: too many steps in a row are not finite.
            InputError: the memory is too small.
        """
        # For a skipped step: the forward pass updates the running statistics of batch norm.
        buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
        try:
            with memory_for(self.care.memory_of_step):
                choices, broken = self.draw(), broken_solves(self.model.deq.stats)
                sums = self._forward_and_backward(batch, choices)
                norm = clip_gradients(self.model, self.clipped, self.care.clip)
                sums, stop, diverged, norm = self._of_all_processes(sums, broken, norm)
        except Exception:
            self._restore(buffers)
            raise
        loss = sums["loss"] + sums["jac_loss"]
        finite = math.isfinite(loss + norm)
        self.set_learning_rate()
        self._whole = False
        if finite:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._restore(buffers)
            self.forget()
            self.counts["skipped"] += 1
            self.skipped_in_a_row += 1
        self.step += 1
        self.advance(batch, sums["loss"])
        self._whole = True
        self._add_to_window(sums, finite, choices)
        if diverged:
            found = self.processes.gather(broken_since(broken, self.model.deq.stats))
            report_diverged(found, self.run, self.step, self.counts)
        if not finite:
            self.run.log(
                f"step {self.step} | skipped: the loss is {loss:.4g}, the gradient norm {norm:.4g}"
            )
            self.run.record("skipped", self.step, loss=loss, gradient_norm=norm)
            if (n := self.skipped_in_a_row) >= self.care.max_skipped:
                self._give_up(f"{n} steps in a row were not finite, the last one")
        return stop

    def _forward_and_backward(self, batch: Any, choices: Choices) -> Tensor:
        """Add up the gradients of all parts, and their summands in float64."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.split(batch)
        sums = torch.zeros(2 + len(self.extra_sums), dtype=torch.float64, device=self.device)
        for i, part in enumerate(parts):
            reduced = i == len(parts) - 1 or not isinstance(self.parallel, DistributedDataParallel)
            # Gradients are reduced over processes once, with the last part.
            with contextlib.nullcontext() if reduced else self.parallel.no_sync():
                loss, jac_loss, extra = self.part(i, part, choices)
                total = loss
                if choices.jac_weight is not None:
                    total = loss + choices.jac_weight * jac_loss
                # DistributedDataParallel averages gradients; those of summands add up.
                (total * self.processes.world_size).backward()
            sums += torch.stack([x.detach().double() for x in (loss, jac_loss, *extra)])
        return sums

    def _of_all_processes(
        self, sums: Tensor, broken: list[int], norm: Tensor
    ) -> tuple[dict[str, float], bool, bool, float]:
        """Sums of all processes; whether one wants to stop; whether a solve diverged; the norm.

        All is read at once: the only host-device synchronisation besides the solvers'.
        """
        # After a failed log write too: sync() raises it in all processes at the next save.
        stop = self.stopping.check() or self.run.failure is not None
        diverged = sum(broken_solves(self.model.deq.stats)) - sum(broken)
        own = torch.tensor([stop, diverged], dtype=torch.float64)
        together = self.processes.sum(torch.cat([sums, own.to(self.device, non_blocking=True)]))
        *sums, stop, diverged, norm = torch.cat([together, norm[None].double()]).tolist()
        names = ("loss", "jac_loss", *self.extra_sums)
        return dict(zip(names, sums, strict=True)), stop > 0, diverged > 0, norm

    def _add_to_window(self, sums: dict[str, float], finite: bool, choices: Choices) -> None:
        window = self._window
        window["steps" if finite else "skipped"] += 1
        if finite:
            window["loss"] += sums["loss"]
            if choices.jac_weight is not None:
                window["jac_loss"] += sums["jac_loss"]
                window["jac_count"] += 1
        for name in self.extra_sums:
            window[name] += sums[name]

    @property
    def gpus(self) -> list[int]:
        """Numbers of this process's GPUs; none on the CPU."""
        if self.device.type != "cuda":
            return []
        return list(getattr(self.parallel, "device_ids", None) or [self.device.index])

    def mean_loss(self) -> float:
        """Mean loss of the window's updates; NaN if there were none."""
        return self._window["loss"] / self._window["steps"] if self._window["steps"] else math.nan

    def begin_window(self) -> None:
        """Reset the sums and solver statistics of the next log line."""
        self._window = self._no_sums()
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

    @classmethod
    def _no_sums(cls) -> dict[str, float]:
        names = ("loss", "jac_loss", *cls.extra_sums)
        return dict.fromkeys(names, 0.0) | {"jac_count": 0, "steps": 0, "skipped": 0}

    @torch.no_grad()
    def _restore(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _give_up(self, trouble: str) -> NoReturn:
        raise TrainingError(
            f"{trouble} at step {self.step}: {self.care.way_out}{last_good(self.run.folder)}"
        )

    # ---- the loop ------------------------------------------------------------------------------

    def train(self, run: Run, finish: Callable[[Run], None] = lambda run: None) -> None:
        """Train up to ``last_step`` updates; log, validate and save when due.

        Before an error ends the run, the state after the last whole step is saved. ``finish`` is
        called after the last step; a stop may interrupt an evaluation in it.

        Raises:
            Stopped: by a signal or the time limit; all the state is saved.
            TrainingError: too many steps in a row, or the weights, are not finite.
            InputError: the memory is too small, or data cannot be read.
        """
        self.run = run
        self.model.train()
        self._window_start = time.perf_counter()
        bar = run.progress(total=self.last_step, initial=self.step)
        with self.stopping, warnings_in(run.log):
            if self.unfinished:
                self._finish_step(validate=True, save=True, stop=False)
            batches = self.batches()
            while True:
                before = self._own_state()
                with self._saved_on_error(before):
                    batch = self.processes.next(batches)
                if batch is None:
                    break
                with self._saved_on_error(before, alone=True):
                    stop = self.update(batch)
                bar.update()
                log, validate, save = self.due()
                if log:
                    self._log()
                self._finish_step(validate, save, stop)
            try:
                finish(run)
            except EvaluationStopped:
                self._stop()

    def try_validation(self) -> None:
        """Evaluate one batch: an error comes now, not after hours of training.

        Raises:
            InputError: a setting or the data does not fit, or the memory is too small.
        """
        if self.unfinished or self.step >= self.last_step:
            return
        before = self._own_state()
        with warnings.catch_warnings(), memory_for(self.care.memory_of_validation):
            warnings.simplefilter("ignore", DEQWarning)  # they come again
            self.rehearse()
        self._put_back(before)
        release_free_memory()

    def _own_state(self) -> tuple[dict, list[dict]]:
        """The state of this process: random generators and solver statistics."""
        return random_states(self.rng, self.gpus), stats_state(self.model.deq.stats)

    def _put_back(self, before: tuple) -> list[str]:
        """Restore :meth:`_own_state`; return log lines on what is not restored."""
        restore_stats(before[1], self.model.deq.stats)
        return restore_random_states(before[0], self.rng, self.gpus)

    @contextlib.contextmanager
    def _saved_on_error(self, before: tuple, *, alone: bool = False) -> Iterator[None]:
        """Save the state, with ``before`` of :meth:`_own_state`, if an error ends the block.

        ``alone``: only this process may have the error, so the others cannot save with it.
        """
        try:
            yield
        except (EvaluationStopped, TrainingError):
            raise
        except Exception as error:
            saved = self._whole and not (alone and self.processes.world_size > 1)
            if saved and not lost_contact(error):
                self._put_back(before)
                with contextlib.suppress(InputError, TrainingError):  # the first error says more
                    self.save()
                    self.run.log(f"an error ends the run after step {self.step}: {self._saved()}")
            raise

    def summarise(self, *, finished: bool = True) -> None:
        """Write the run's last record, also as a log line."""
        counts = self.counts
        self.run.log(
            f"{self.step} steps | skipped {counts['skipped']} | diverged solves: forward "
            f"{counts['diverged_forward']}, backward {counts['diverged_backward']}"
        )
        self.run.record("summary", self.step, finished=finished, **counts)

    def _finish_step(self, validate: bool, save: bool, stop: bool) -> None:
        """Validate and save if due, then stop if asked."""
        if validate:
            self.unfinished = True  # if a stop prevents it, the resumed run validates
            stop = stop or not self._validate()
        if validate or save or stop:
            self.save()
        if stop:
            self._stop()

    def _stop(self) -> NoReturn:
        reasons = self.processes.gather((self.stopping.reason, self.stopping.code))
        reason, code = next(found for found in reasons if found[0])
        self.run.log(f"stopped by {reason} at step {self.step}: {self._saved()}")
        self.summarise(finished=False)
        raise Stopped(f"stopped by {reason} at step {self.step}", code)

    def _saved(self) -> str:
        return "all is saved" if self.run.folder else "nothing is saved"

    def _log(self) -> None:
        """Write a log line and a record: means over the steps since the previous line."""
        window, elapsed = self._window, time.perf_counter() - self._window_start
        if not window["steps"]:  # no mean
            self.run.log(f"step {self.step} | all {window['skipped']} since the last line skipped")
            self.begin_window()
            return
        values, line = self.figures(self.mean_loss(), elapsed)
        solver, words = solver_figures(summed_stats(self.model.deq.stats, self.processes))
        values |= solver | {"memory_mib": peak_memory_mib(self.device)}
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
        """Validate; keep the phase's best weights. False if a stop interrupts it."""
        paused, before = time.perf_counter(), self._own_state()
        try:
            with self._saved_on_error(before), memory_for(self.care.memory_of_validation):
                found, record, name, score = self.validate()
        except EvaluationStopped:
            self._put_back(before)  # the resumed run validates again
            return False
        release_free_memory()
        phase = "stacked" if 0 < self.step <= self.pretrain_steps else "equilibrium"
        self.run.log(f"step {self.step} | valid ({phase}) | {record.pop('text')}")
        self.run.record("valid", self.step, phase=phase, **record)
        # Scores of the two phases are not comparable.
        if phase != self.best.get("phase") or _comparable(score) > _comparable(self.best["score"]):
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
        if not self.run.still_has_its_folder():
            raise InputError(
                f"{self.run.folder} was moved, removed or replaced, so step {self.step} cannot be "
                f"saved: put the run's folder back, and {self.care.resume} continues the run"
            )
        try:
            write(path)
        except OSError as error:
            raise InputError(
                f"{error.filename or path} could not be written at step {self.step} "
                f"({error.strerror or error}): mend that, and {self.care.resume} continues the run"
                f"{last_good(self.run.folder)}"
            ) from error

    def state_dict(self) -> dict:
        """Return the whole state as tensors and plain containers."""
        states, stats = zip(*self.processes.gather(self._own_state()), strict=True)
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
            # By rank: each draws its own dropout masks and solves for its own samples.
            "random_states": list(states),
            "solver_stats": list(stats),
            **self.extra_state(),
        }

    @classmethod
    def check(cls, state: Any, source: Path) -> None:
        """Raise an InputError if ``state`` is not a checkpoint of this trainer."""
        version = state.get("format") if isinstance(state, dict) else None
        if type(version) is not int or version != FORMAT:
            raise InputError(f"{source} is not a checkpoint of this trainer: give its {CHECKPOINT}")
        judged = ("fixed", "optimizer", cls.weights_key, "random_states", "solver_stats")
        forms = {
            **dict.fromkeys(judged, ...),  # by functions of their own
            "step": 0,
            "best": {"phase": "", "score": 0.0, "step": 0, "name": ""},
            "counts": dict.fromkeys(_COUNTS, 0),
            "skipped_in_a_row": 0,
            "unfinished": False,
            "window": cls._no_sums(),
            **cls.extra_parts,
        }
        if missing := sorted(forms.keys() - state.keys()):
            raise InputError(f"{source} lacks {', '.join(missing)}: it is not whole, use another")
        if state["best"] == {}:
            forms["best"] = {}
        with naming(str(source)):
            check_form({name: state[name] for name in forms}, forms, "state")
            check_plain(state["fixed"], "state['fixed']")
            check_random_states(state["random_states"])
            check_stats(state["solver_stats"], len(state["random_states"]))
        check_tensors(state[cls.weights_key], source)

    def load_state_dict(self, state: dict, source: Path) -> list[str]:
        """Continue exactly where ``state`` was saved; return log lines on what is not restored.

        Raises:
            InputError: ``state`` has another format, or is of another model or other settings
                (:meth:`fixed`).
        """
        self.check(state, source)
        fixed = self.fixed_in(state)
        for name, value in self.fixed().items():
            if (saved := fixed.get(name)) != value:
                raise InputError(
                    f"{source} was saved with {name} {saved}, and this run has {value}: continue "
                    "with the former"
                )
        load_state(self.model, state[self.weights_key], str(source), same_dtypes=True)
        self.step, self.best, self.counts = state["step"], state["best"], state["counts"]
        self.skipped_in_a_row, self.unfinished = state["skipped_in_a_row"], state["unfinished"]
        self._window = state["window"]
        with naming(str(source)):
            restore_optimizer(self.optimizer, state["optimizer"])
            self.load_extra(state)
        states, rank, here = state["random_states"], self.processes.rank, self.processes.world_size
        if here == (before := len(states)):
            return self._put_back((states[rank], state["solver_stats"][rank]))
        self.rng.setstate(states[0]["random"])
        return [
            f"{here} process(es) continue what {before} began: dropout masks and vectors of the "
            "Jacobian loss come from new streams, and a solver stops by the samples of its process"
        ]
