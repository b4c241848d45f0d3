"""One optimiser step of any trainer, in any number of processes: taken together, or skipped."""

import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.distributed import Processes
from lib.experiment import Run, last_good
from lib.stopping import Stopping
from lib.training import PASSES, TrainingError

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


class Stepper:
    """Takes steps with a model that has an equilibrium (``model.deq``), and counts its troubles.

    A step whose loss or gradient is not finite, in any process, changes nothing: it is skipped,
    counted and logged. What a step of which model computes is in subclasses.

    Args:
        model: on ``device``.
        optimizer: of all its parameters.
        device: of this process.
        processes: of the run; they share every batch and take every step together.
        seed: of the choices of a step that are not the model's.
        care: see there.
        stopping: collects the wish to stop.
    """

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
        self.counts = {"skipped": 0, "diverged_forward": 0, "diverged_backward": 0}
        self.skipped_in_a_row = 0
        self.run = Run.silent()
        self.begin_window()

    # ---- what subclasses define ----------------------------------------------------------------

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

    def jac_weight_of(self, step: int) -> float:
        """Weight of the Jacobian loss in update ``step``."""
        raise NotImplementedError

    # ---- a step --------------------------------------------------------------------------------

    def update(self, batch: Any) -> bool:
        """One optimiser step on this process's share of a batch; whether the run is to stop.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        choices, broken = self.draw(), self._broken()
        # What a forward changes in a model: the statistics of batch norm.
        buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
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
            self.stopping.check() or self.run.failure is not None,  # save tells all of it
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
            self._skip(buffers)
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

    @property
    def gpus(self) -> list[int]:
        """Numbers of the GPUs that this process computes on; none on the CPU."""
        if self.device.type != "cuda":
            return []
        return list(getattr(self.parallel, "device_ids", None) or [self.device.index])

    def mean_loss(self) -> float:
        """Of the updates since the window began; NaN if there were none."""
        return self._window["loss"] / self._window["steps"] if self._window["steps"] else math.nan

    def begin_window(self) -> None:
        """Forget what was summed up for the next line of the log."""
        names = ("loss", "jac_loss", *self.extra_sums)
        self._window = dict.fromkeys(names, 0.0) | {"jac_count": 0, "steps": 0, "skipped": 0}
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

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

    def _skip(self, buffers: list[Tensor]) -> None:
        """Leave an update out, and put the model's buffers back."""
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
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

    def _give_up(self, trouble: str) -> NoReturn:
        raise TrainingError(
            f"{trouble} at step {self.step}: {self.care.way_out}{last_good(self.run.folder)}"
        )
