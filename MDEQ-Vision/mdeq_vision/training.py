"""Training of image models: one object that owns everything a checkpoint must hold."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from yacs.config import CfgNode

from lib.distributed import BalancedDataParallel, Processes
from lib.errors import InputError
from lib.experiment import Run
from lib.precision import autocast
from lib.training import (
    check_checkpoint,
    give_up,
    random_states,
    restore_optimizer,
    restore_random_states,
    restore_stats,
    save_checkpoint,
    save_weights,
    solver_figures,
    stats_state,
)
from mdeq_vision.datasets import make_loader, n_batches, on_device
from mdeq_vision.evaluation import Evaluation
from mdeq_vision.losses import mean_loss
from mdeq_vision.model import MDEQNet
from mdeq_vision.schedules import jac_factor, learning_rate, make_optimizer

FORMAT = 1  # of the checkpoint
_WAY_OUT = "lower TRAIN.LR, or raise LOSS.JAC_LOSS_WEIGHT"  # of what is not finite


class Trainer:
    """Trains an MDEQ through both phases, validates, saves, resumes.

    What differs between classification and segmentation is in subclasses: the loss, the figures
    of the log, the evaluation. ``state_dict`` holds all that the next step depends on, so a run
    that was killed and resumed prints the same losses, bit for bit, as one that was not.

    Args:
        cfg: the configuration.
        model: on ``device``.
        train_set, valid_set: data sets.
        device: where the model is; with several ``gpus``, the first of them.
        gpus: the GPUs of this process; more than one makes it a DataParallel model.
        processes: the processes of the run; several make it a DistributedDataParallel model.
    """

    drop_last = False  # leave out a last batch that is not full

    def __init__(
        self,
        cfg: CfgNode,
        model: MDEQNet,
        train_set: Dataset,
        valid_set: Dataset,
        device: torch.device,
        gpus: list[int],
        processes: Processes,
    ):
        self.cfg, self.model, self.device, self.processes = cfg, model, device, processes
        self.train_set, self.valid_set = train_set, valid_set
        self.batch_size = cfg.TRAIN.BATCH_SIZE_PER_GPU * max(len(gpus), 1) * processes.world_size
        self.n_batches = n_batches(
            len(train_set), self.batch_size, drop_last=self.drop_last, percent=cfg.PERCENT
        )
        self.optimizer = make_optimizer(cfg, model)
        self.parallel = model
        if processes.world_size > 1:
            self.parallel = DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )
        elif len(gpus) > 1:
            # output, jac_loss, sradius
            self.parallel = BalancedDataParallel(model, -1, 0, (0, None, 0), device_ids=gpus)
        # Choices of a step that are not the model's (whether to regularise, how many iterations);
        # all processes make the same.
        self.rng = random.Random(cfg.SEED)
        self.epoch, self.position = cfg.TRAIN.BEGIN_EPOCH, 0  # batches done in this epoch
        self.step = self.epoch * self.n_batches
        self.best: dict = {}  # phase, score, step
        self._reset_window()

    # ---- what subclasses define ----------------------------------------------------------------

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch and the weight to divide it by, both scalars."""
        raise NotImplementedError

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """How many predictions are right, out of how many (samples or pixels)."""
        raise NotImplementedError

    evaluator: Callable[..., Evaluation]  # a function of mdeq_vision.evaluation

    # ---- training ------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        return self.cfg.TRAIN.END_EPOCH * self.n_batches

    def train(self, run: Run) -> None:
        """Train up to END_EPOCH, validating and saving on the way."""
        self.parallel.train()
        self._window_start = time.perf_counter()
        bar = run.progress(total=self.last_step, initial=self.step)
        while self.epoch < self.cfg.TRAIN.END_EPOCH:
            for images, target in self._batches():
                self._update(images, target)
                self.position += 1
                bar.update()
                self._after_update(run)

    def _batches(self):
        """The rest of this epoch."""
        loader = make_loader(
            self.train_set,
            batch_size=self.batch_size,
            seed=self.cfg.SEED,
            epoch=self.epoch,
            start=self.position,
            shuffle=self.cfg.TRAIN.SHUFFLE,
            drop_last=self.drop_last,
            percent=self.cfg.PERCENT,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            workers=self.cfg.WORKERS,
            pin_memory=self.cfg.PIN_MEMORY and self.device.type == "cuda",
        )
        return on_device(loader, self.device)

    def evaluate(self, train_step: int) -> Evaluation:
        """Evaluate on the validation set, in the phase of ``train_step``."""
        return self.evaluator(
            self.cfg,
            self.model,
            self.valid_set,
            train_step=train_step,
            device=self.device,
            processes=self.processes,
        )

    def _update(self, images: Tensor, target: Tensor) -> None:
        """One optimiser step on a batch on the device (this process's share of it)."""
        cfg, world_size = self.cfg, self.processes.world_size
        factor = jac_factor(cfg, self.step, self.epoch)
        # Both are drawn in every step, so that the random stream does not depend on the phase.
        delta = self.rng.randint(-cfg.DEQ.RAND_F_THRES_DELTA, 1)
        regularise = self.rng.random() < cfg.LOSS.JAC_LOSS_FREQ and factor > 0
        if not regularise or cfg.DEQ.RAND_F_THRES_DELTA == 0:
            delta = 0
        with autocast(cfg.AMP, self.device):
            output, jac_loss, _ = self.parallel(
                images,
                train_step=self.step,
                compute_jac_loss=regularise,
                f_thres=max(1, cfg.DEQ.F_THRES + delta),
                b_thres=cfg.DEQ.B_THRES,
            )
        output = output.to(images.dtype)
        total, weight = self.loss(output, target)
        jac_loss = jac_loss.mean()
        counts = [total.detach(), weight, *self.hits(output.detach(), target)]
        sums = self.processes.sum(torch.stack([c.double() for c in counts]))
        # DistributedDataParallel averages the gradients, but the weights differ per process.
        loss = mean_loss(total, sums[1].to(total)) * world_size
        self.optimizer.zero_grad(set_to_none=True)
        (loss + factor * jac_loss if regularise else loss).backward()
        if cfg.TRAIN.CLIP > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.TRAIN.CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, self.step, self.n_batches)
        self.optimizer.step()
        self.step += 1

        window = self._window
        window["loss"] += mean_loss(*sums[:2])
        window["hits"] += sums[2:]
        window["steps"] += 1
        window["images"] += len(images) * world_size
        if regularise:
            window["jac_loss"] += jac_loss.detach().double()
            window["jac_count"] += 1

    def _after_update(self, run: Run) -> None:
        cfg = self.cfg
        border = self.step == cfg.TRAIN.PRETRAIN_STEPS
        ends_epoch = self.position == self.n_batches
        if self.step % cfg.PRINT_FREQ == 0 or border or self.step == self.last_step:
            self._log(run)
        if border or ends_epoch:
            self._validate(run)
        if ends_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        if border or ends_epoch or (cfg.SAVE_FREQ and self.step % cfg.SAVE_FREQ == 0):
            self.save(run)

    def _log(self, run: Run) -> None:
        """One line and one record of the means since the last one."""
        window, elapsed = self._window, time.perf_counter() - self._window_start
        steps, lr = window["steps"], self.optimizer.param_groups[0]["lr"]
        loss = (window["loss"] / steps).item()
        hits, count = window["hits"].tolist()
        values = {"loss": loss, "accuracy": hits / max(count, 1), "lr": lr}
        values["images_per_s"] = window["images"] / elapsed
        line = (
            f"epoch {self.epoch} [{self.position}/{self.n_batches}] | step {self.step} | "
            f"lr {lr:.3g} | {1000 * elapsed / steps:.0f} ms/step | "
            f"{values['images_per_s']:.1f} images/s | loss {loss:.4f} | "
            f"accuracy {100 * values['accuracy']:.2f}%"
        )
        figures, words = solver_figures(self.model.deq.stats)
        values |= figures
        line += words
        if window["jac_count"]:
            values["jac_loss"] = (window["jac_loss"] / window["jac_count"]).item()
            values["jac_loss_weight"] = jac_factor(self.cfg, self.step - 1, self.epoch)
            line += f" | jac {values['jac_loss']:.3f} x {values['jac_loss_weight']:.2f}"
        run.log(line)
        run.record("train", self.step, **values)
        self._reset_window()
        if not math.isfinite(loss):
            give_up(run, f"the loss is {loss}", self.step, _WAY_OUT)

    def _validate(self, run: Run) -> None:
        """Evaluate in the phase of the last update; keep the best weights of the last phase."""
        paused = time.perf_counter()
        phase = "stacked" if self.step - 1 < self.cfg.TRAIN.PRETRAIN_STEPS else "equilibrium"
        found = self.evaluate(self.step - 1)
        run.log(f"step {self.step} | valid ({phase}) | {found.text()}")
        run.record("valid", self.step, phase=phase, **found.figures)
        score = found.figures[found.score]
        # A stacked network and an equilibrium are compared with their own kind.
        if phase != self.best.get("phase") or not score <= self.best["score"]:
            self.best = {"phase": phase, "score": score, "step": self.step, "name": found.score}
            save_weights(run, self.model, self.step, _WAY_OUT)
        self._window_start += time.perf_counter() - paused

    def _reset_window(self) -> None:
        zeros = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._window = {"loss": zeros[0].clone(), "jac_loss": zeros[0].clone(), "hits": zeros}
        self._window |= {"jac_count": 0, "steps": 0, "images": 0}
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self, run: Run) -> None:
        """Write the checkpoint of the run, unless its weights are no longer finite."""
        save_checkpoint(run, self.model, self.state_dict(), self.step, _WAY_OUT)

    def state_dict(self) -> dict:
        """All that the next step depends on: tensors and plain containers."""
        return {
            "format": FORMAT,
            "fixed": self._fixed,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "best": self.best,
            # Each process draws its own dropout masks.
            "random_states": self.processes.gather(random_states(self.rng, self.device)),
            "window": self._window,
            "solver_stats": stats_state(self.model.deq.stats),
        }

    @property
    def _fixed(self) -> dict:
        """Without these the position in the data, or the optimiser's state, mean nothing."""
        return {
            "TRAIN.OPTIMIZER": self.cfg.TRAIN.OPTIMIZER,
            "an effective batch size of": self.batch_size,
            "a number of batches per epoch of": self.n_batches,
            "SEED": self.cfg.SEED,
        }

    def load_state_dict(self, state: dict, source: Path) -> None:
        """Continue exactly where ``state`` was taken; the model's weights are loaded elsewhere.

        Raises:
            InputError: a checkpoint of another format, or of a run with other batches.
        """
        check_checkpoint(state, self.state_dict(), source)
        for name, value in self._fixed.items():
            if state["fixed"].get(name) != value:
                raise InputError(
                    f"{source} was saved with {name} {state['fixed'].get(name)}, and this run has "
                    f"{value}: continue with the former"
                )
        restore_optimizer(self.optimizer, state["optimizer"], self.cfg.TRAIN.WD)
        self.step, self.epoch = state["step"], state["epoch"]
        self.position, self.best = state["position"], state["best"]
        own = state["random_states"]
        if len(own) == self.processes.world_size:  # else another number: streams begin anew
            restore_random_states(own[self.processes.rank], self.rng, self.device)
        self._window = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in state["window"].items()
        }
        restore_stats(state["solver_stats"], self.model.deq.stats)
