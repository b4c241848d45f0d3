"""Training: one object that owns everything a checkpoint must hold."""

import argparse
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from deq_sequence.corpus import Corpus
from deq_sequence.evaluation import Evaluation, evaluate, perplexity, settings_from
from deq_sequence.iterators import LMOrderedIterator
from deq_sequence.model import DEQTransformerLM
from deq_sequence.schedules import LearningRate, make_optimizer
from lib.distributed import BalancedDataParallel
from lib.errors import InputError
from lib.experiment import Run
from lib.jacobian import jac_loss_weight_at
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

FORMAT = 1  # of the checkpoint
_WAY_OUT = "lower --lr, or raise --jac_loss_weight"  # of a loss or weights that are not finite


class Trainer:
    """Trains a DEQ-Transformer through both phases, evaluates, saves, resumes.

    ``state_dict`` holds all that the next step depends on (weights, optimiser, schedule, step,
    data position, memory, random states) and the running means of the log, so a run that was
    killed and resumed prints the same losses, bit for bit, as one that was not.
    """

    def __init__(self, args: argparse.Namespace, model: DEQTransformerLM, corpus: Corpus, device):
        self.args, self.model, self.corpus, self.device = args, model, corpus, device
        self.iterator = LMOrderedIterator(
            corpus.train, args.batch_size, args.tgt_len, device=device
        )
        for text in (corpus.valid, corpus.test):  # too short a text should not wait to be found
            LMOrderedIterator(text, args.eval_batch_size, args.eval_tgt_len)
        self.optimizer = make_optimizer(args, model)
        self.learning_rate = LearningRate(args, self.optimizer)
        # --clip_nonemb leaves out the embedding and what is tied to it.
        left_out = {id(p) for p in model.word_emb.parameters()} if args.clip_nonemb else set()
        self._clipped = [p for p in model.parameters() if id(p) not in left_out]
        self.parallel = model
        if args.multi_gpu and torch.cuda.device_count() > 1 and device.type == "cuda":
            share = args.gpu0_bsz // args.batch_chunk if args.gpu0_bsz >= 0 else -1
            # loss, jac_loss, sradius, z_mem, u_mem
            self.parallel = BalancedDataParallel(model, share, 1, output_dims=(1, None, 0, 1, 1))
        # Choices of a step that are not the model's (whether to regularise, how many iterations).
        self.rng = random.Random(args.seed)
        self.step = args.start_train_steps
        self.epoch, self.row = 0, 0
        self.mems: list[list[Tensor]] = [[] for _ in range(args.batch_chunk)]
        self.best_loss = math.inf
        self._reset_window()

    @property
    def stacked(self) -> bool:
        """Whether the next step is one of the stacked phase."""
        return 0 <= self.step < self.args.pretrain_steps

    def train(self, run: Run) -> None:
        """Train up to ``max_step`` updates, evaluating and saving on the way."""
        args = self.args
        self.model.train()
        self.model.reset_length(args.tgt_len, args.mem_len)
        self._window_start = time.perf_counter()
        bar = run.progress(total=args.max_step, initial=self.step)
        while self.step < args.max_step:
            batches = (
                self.iterator.iterate_varlen(self.row, self.rng)
                if args.varlen
                else self.iterator.iterate(self.row)
            )
            for data, target, seq_len in batches:
                self._update(data, target)
                self.row += seq_len
                bar.update()
                self._after_update(run)
                if self.step >= args.max_step:
                    break
            else:
                # A new pass over the text begins without memory, as the first did.
                self.epoch, self.row = self.epoch + 1, 0
                self.mems = [[] for _ in range(args.batch_chunk)]

    def evaluate(self, data: Tensor) -> Evaluation:
        """Evaluate with the settings of the run, in the phase of the last update."""
        return evaluate(self.model, data, train_step=self.step - 1, **settings_from(self.args))

    def _update(self, data: Tensor, target: Tensor) -> None:
        """One optimiser step on a batch (tgt_len, batch_size), in chunks."""
        args, chunks = self.args, self.args.batch_chunk
        equilibrium = not self.stacked
        # Both are drawn in every step, so that the random stream does not depend on the phase.
        f_thres = max(1, args.f_thres - self.rng.randint(0, args.rand_f_thres_delta))
        regularise = self.rng.random() < args.jac_loss_freq and equilibrium
        jac_weight = jac_loss_weight_at(
            self.step, args.jac_loss_weight, args.jac_incremental, args.pretrain_steps
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(data.chunk(chunks, dim=1), target.chunk(chunks, dim=1), strict=True)
        for i, (words, labels) in enumerate(parts):
            with autocast(args.amp, self.device):
                loss, jac_loss, _, *self.mems[i] = self.parallel(
                    words,
                    labels,
                    self.mems[i],
                    train_step=self.step,
                    f_thres=f_thres,
                    b_thres=args.b_thres,
                    compute_jac_loss=regularise and jac_weight > 0,
                )
            nll, jac_loss = loss.float().mean(), jac_loss.float().mean()
            total = nll + jac_weight * jac_loss if regularise else nll
            (total / chunks).backward()
            self._window["loss"] += nll.detach().double() / chunks
            if regularise and jac_weight > 0:
                self._window["jac_loss"] += jac_loss.detach().double() / chunks
                self._window["jac_count"] += 1 / chunks
        if args.clip > 0:
            torch.nn.utils.clip_grad_norm_(self._clipped, args.clip)
        self.learning_rate.set(self.step)
        self.optimizer.step()
        self.step += 1
        self._window["steps"] += 1
        self._window["tokens"] += target.numel()

    def _after_update(self, run: Run) -> None:
        args = self.args
        border = self.step == args.pretrain_steps
        if self.step % args.log_interval == 0 or border:
            self._log(run)
        if self.step % args.eval_interval == 0 or border or self.step == args.max_step:
            self._validate(run)
            if border:
                # A stacked network and an equilibrium are compared with their own kind.
                self.best_loss = math.inf
            self.save(run)
        elif args.save_interval and self.step % args.save_interval == 0:
            self.save(run)

    def _log(self, run: Run) -> None:
        """One line and one record of the means since the last one."""
        window = self._window
        elapsed = time.perf_counter() - self._window_start
        steps, lr = window["steps"], self.optimizer.param_groups[0]["lr"]
        loss = (window["loss"] / steps).item()
        values = {"loss": loss, "perplexity": perplexity(loss), "lr": lr}
        values["tokens_per_s"] = window["tokens"] / elapsed
        line = (
            f"step {self.step} | epoch {self.epoch} | lr {lr:.3g} | "
            f"{1000 * elapsed / steps:.0f} ms/step | {values['tokens_per_s']:.0f} tok/s | "
            f"loss {loss:.4f} | {self._figure(loss)}"
        )
        figures, words = solver_figures(self.model.deq.stats)
        values |= figures
        line += words
        if window["jac_count"]:
            values["jac_loss"] = (window["jac_loss"] / window["jac_count"]).item()
            values["jac_loss_weight"] = jac_loss_weight_at(
                self.step - 1,  # that of the last update
                self.args.jac_loss_weight,
                self.args.jac_incremental,
                self.args.pretrain_steps,
            )
            line += f" | jac {values['jac_loss']:.3f} x {values['jac_loss_weight']:.2f}"
        run.log(line)
        run.record("train", self.step, **values)
        self._reset_window()
        if not math.isfinite(loss):
            give_up(run, f"the loss is {loss}", self.step, _WAY_OUT)

    def _validate(self, run: Run) -> None:
        """Evaluate on the validation text in the phase of the last update; keep the best."""
        paused = time.perf_counter()
        phase = "stacked" if 0 <= self.step - 1 < self.args.pretrain_steps else "equilibrium"
        found = self.evaluate(self.corpus.valid)
        run.log(f"step {self.step} | valid ({phase}) | {found.text(self.corpus.characters)}")
        run.record(
            "valid",
            self.step,
            phase=phase,
            perplexity=found.perplexity,
            **{name: value for name, value in asdict(found).items() if value is not None},
        )
        self.learning_rate.after_evaluation(found.loss, self.step)
        if found.loss < self.best_loss:
            self.best_loss = found.loss
            save_weights(run, self.model, self.step, _WAY_OUT)
        self._window_start += time.perf_counter() - paused

    def _figure(self, loss: float) -> str:
        if self.corpus.characters:
            return f"bpc {loss / math.log(2):.4f}"
        return f"ppl {perplexity(loss):.2f}"

    def _reset_window(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self._window = {"loss": zero, "jac_loss": zero.clone(), "jac_count": 0.0}
        self._window |= {"steps": 0, "tokens": 0}
        self._window_start = time.perf_counter()
        self.model.deq.stats.reset()

    def save(self, run: Run) -> None:
        """Write the checkpoint of the run, unless its weights are no longer finite."""
        save_checkpoint(run, self.model, self.state_dict(), self.step, _WAY_OUT)

    def state_dict(self) -> dict:
        """All that the next step depends on: tensors and plain containers."""
        return {
            "format": FORMAT,
            "fixed": self._fixed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "row": self.row,
            "mems": self.mems,
            "best_loss": self.best_loss,
            **random_states(self.rng, self.device),
            "window": self._window,
            "solver_stats": stats_state(self.model.deq.stats),
        }

    @property
    def _fixed(self) -> dict:
        """Settings without which the data position, memory or optimiser state mean nothing."""
        return {name: getattr(self.args, name) for name in ("batch_size", "batch_chunk", "optim")}

    def load_state_dict(self, state: dict, source: Path) -> None:
        """Continue exactly where ``state`` was taken.

        Raises:
            InputError: a checkpoint of another format, or of a run with other batch settings.
        """
        check_checkpoint(state, self.state_dict(), source)
        for name, value in state["fixed"].items():
            if getattr(self.args, name) != value:
                raise InputError(f"{source} was saved with --{name} {value}: continue with that")
        restore_optimizer(self.optimizer, state["optimizer"], self.args.weight_decay)
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.step, self.epoch, self.row = state["step"], state["epoch"], state["row"]
        self.mems = [[m.to(self.device) for m in mems] for mems in state["mems"]]
        self.best_loss = state["best_loss"]
        restore_random_states(state, self.rng, self.device)
        self._window = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in state["window"].items()
        }
        restore_stats(state["solver_stats"], self.model.deq.stats)
