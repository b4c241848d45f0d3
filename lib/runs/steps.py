"""One optimiser step of any trainer. All processes take the step together, or all skip it."""

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

from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.run_folder import Run, last_good
from lib.runs.training import PASSES, TrainingError

_DIVERGED_SHOWN = 20  # at most this many log lines on diverged solves; metrics record all of them


@dataclass(frozen=True)
class Care:
    """How a run is protected against divergence and interruption.

    Attributes:
        keep: number of checkpoints kept, including the newest.
        max_skipped: the run ends after this many non-finite steps in a row.
        clip: largest gradient norm; 0 or less turns clipping off.
        weight_decay: the optimiser's weight decay, also after a resume.
        resume: the option that continues a run, such as '--restart', for messages.
        way_out: advice against non-finite numbers, for messages.
    """

    keep: int
    max_skipped: int
    clip: float
    weight_decay: float
    resume: str
    way_out: str


@dataclass(frozen=True)
class Choices:
    """The random choices of a step, the same in all processes.

    With ``jac_weight`` 0 the step has no Jacobian loss.
    """

    f_thres: int
    jac_weight: float


class Stepper:
    """Takes optimiser steps with a DEQ model (``model.deq``); counts skipped steps and divergence.

    A step is skipped, counted and logged if its loss or gradient is not finite in any process. A
    skipped step leaves the model and the optimiser unchanged. Subclasses define what a step
    computes.

    Args:
        model: the model, on ``device``.
        optimizer: the optimiser of all parameters of ``model``.
        device: the device of this process.
        processes: the processes of the run; they share every batch and take every step together.
        seed: seed of :meth:`draw`, the choices made outside the model.
        care: see :class:`Care`.
        stopping: collects the requests to stop.
    """

    extra_sums: tuple[str, ...] = ()  # names of the sums that ``part`` returns beside the losses

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
        """Make the random choices of a step, with the same number of draws in both phases."""
        raise NotImplementedError

    def split(self, batch: Any) -> Sequence[Any]:
        """Split this process's share of a batch into parts; the model takes them one by one."""
        raise NotImplementedError

    def part(self, index: int, part: Any, choices: Choices) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run one forward pass on a part of the batch.

        Returns:
            This part's contributions to the batch's mean loss, to the mean Jacobian loss, and to
            each of ``extra_sums``. All are 0-dim tensors. Summed over parts and processes they
            give the values of the whole batch.
        """
        raise NotImplementedError

    def set_learning_rate(self) -> None:
        """Set the learning rate of the coming update."""
        raise NotImplementedError

    def advance(self, batch: Any) -> None:
        """Move the position in the data past ``batch``."""
        raise NotImplementedError

    def forget(self) -> None:
        """Discard any further state that a skipped step may have spoilt, such as memory."""

    def jac_weight_of(self, step: int) -> float:
        """Weight of the Jacobian loss in update ``step``."""
        raise NotImplementedError

    # ---- a step --------------------------------------------------------------------------------

    def update(self, batch: Any) -> bool:
        """Take one optimiser step on this process's share of a batch.

        Returns:
            Whether the run should stop, the same in all processes.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        choices, broken = self.draw(), self._broken()
        # For a skipped step: the forward pass updates the running statistics of batch norm.
        buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.split(batch)
        sums = torch.zeros(2 + len(self.extra_sums), dtype=torch.float64, device=self.device)
        for i, part in enumerate(parts):
            with self._gradients_stay(i < len(parts) - 1):
                loss, jac_loss, extra = self.part(i, part, choices)
                total = loss + choices.jac_weight * jac_loss if choices.jac_weight else loss
                # DistributedDataParallel averages gradients over processes; here they must add up.
                (total * self.processes.world_size).backward()
            sums += torch.stack([x.detach().double() for x in (loss, jac_loss, *extra)])
        norm = self._clip()
        events = [
            # A failed log write: stop; sync() raises it in all processes at the next save.
            self.stopping.check() or self.run.failure is not None,
            *(b - a for a, b in zip(broken, self._broken(), strict=True)),
        ]
        events = torch.tensor(events, dtype=torch.float64).to(self.device, non_blocking=True)
        sums = self.processes.sum(torch.cat([sums, events]))
        # The only host-device synchronisation of a step, apart from those in the solvers.
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
        """Mean loss of the updates since the window began; NaN if there were none."""
        return self._window["loss"] / self._window["steps"] if self._window["steps"] else math.nan

    def begin_window(self) -> None:
        """Reset the sums and solver statistics from which the next log line is made."""
        names = ("loss", "jac_loss", *self.extra_sums)
        self._window = dict.fromkeys(names, 0.0) | {"jac_count": 0, "steps": 0, "skipped": 0}
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

    def _gradients_stay(self, stay: bool):
        """If ``stay``, a context that does not reduce gradients over processes, else no effect.

        Gradients are reduced once per step, in the backward pass of the last part.
        """
        if stay and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """Clip the gradients of ``clipped``; return the norm of all gradients before it, 0-dim."""
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
        """Count a skipped update, and restore the model's buffers."""
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
        """Log and record the solves of the last step that diverged, in any process."""
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
