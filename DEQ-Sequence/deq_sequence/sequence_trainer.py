"""What the trainers of the DEQ-Transformer share: a step, its settings, and the log line."""

import argparse
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from deq_sequence.evaluation import LESS_MEMORY, perplexity
from deq_sequence.model import DEQTransformerLM
from deq_sequence.schedules import LearningRate, make_optimizer
from deq_sequence.text.vocabulary import Vocab
from lib.data_parallel import BalancedDataParallel
from lib.errors import InputError
from lib.jacobian import jac_loss_weight_at
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.task import Care, Choices, Summands
from lib.runs.trainer import Trainer
from lib.solvers.precision import autocast

MODE, VOCABULARY = "--tie_proj_mode", "the vocabulary"  # keys in ``fixed``
_SINCE = ("--not_tied", "--seed")  # older checkpoints do not have these


class SequenceTrainer(Trainer):
    """Trains a DEQ-Transformer on batches (words, targets) of shape (length, sequences) each.

    The words may be longer than the targets: they then begin with extra context. Every process has
    its own share of each batch.
    """

    extra_parts: ClassVar = {"learning_rate": ...}
    extra_sums = ("tokens",)

    def __init__(
        self,
        args: argparse.Namespace,
        model: DEQTransformerLM,
        vocab: Vocab,
        device: torch.device,
        processes: Processes,
        stopping: Stopping | None,
    ):
        self.args, self.vocab = args, vocab
        self.streams = processes.part(args.batch_size)
        own = self.streams.stop - self.streams.start
        if own < args.batch_chunk:
            raise InputError(
                f"--batch_size {args.batch_size} leaves a process {own} sequences, too few for "
                f"--batch_chunk {args.batch_chunk}: lower the latter, or start fewer processes"
            )
        super().__init__(
            model,
            make_optimizer(args, model),
            device,
            processes,
            seed=args.seed,
            care=Care(
                keep=args.keep_checkpoints,
                max_skipped=args.max_skipped,
                clip=args.clip,
                resume="--restart",
                way_out="lower --lr, or raise --jac_loss_weight",
                memory_of_step="raise --batch_chunk, or lower --batch_size",
                memory_of_validation=LESS_MEMORY,
            ),
            stopping=stopping or Stopping(args.max_time),
        )
        self.learning_rate = LearningRate(args, self.optimizer)
        if args.clip_nonemb:  # leaves out parameters tied to the embeddings, too
            left_out = {id(p) for p in model.word_emb.parameters()}
            left_out |= {id(model.get_parameter(t.ours)) for t in model.ties if t.mode != "apart"}
            self.clipped = [p for p in model.parameters() if id(p) not in left_out]
        if model.start is not None:  # it learns by itself: its gradient must not shorten others
            own = {id(p) for p in model.start.parameters()}
            self.clipped = [p for p in self.clipped if id(p) not in own]
        if args.multi_gpu and torch.cuda.device_count() > 1 and device.type == "cuda":
            share = args.gpu0_bsz // args.batch_chunk if args.gpu0_bsz >= 0 else -1
            # loss, jac_loss, sradius, z_mem, u_mem
            self.parallel = BalancedDataParallel(model, share, 1, output_dims=(1, None, 0, 1, 1))
        self.last_step, self.pretrain_steps = args.max_step, args.pretrain_steps
        self.step = args.start_train_steps
        self.sequences = args.batch_size  # in the batch of all processes
        self.forget()

    # ---- a step --------------------------------------------------------------------------------

    def threshold(self) -> int:
        """The upper end of the forward threshold of the coming step."""
        return self.args.f_thres

    def draw(self) -> Choices:
        # Two draws in every step, so that the random stream does not depend on the phase.
        f_thres = max(1, self.threshold() - self.rng.randint(0, self.args.rand_f_thres_delta))
        regularise = self.rng.random() < self.args.jac_loss_freq
        weight = self.jac_weight_of(self.step)
        wanted = regularise and weight > 0 and self.step >= self.pretrain_steps
        return Choices(f_thres, weight if wanted else None)

    def split(self, batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        chunks = self.args.batch_chunk
        return list(zip(*(part.tensor_split(chunks, dim=1) for part in batch), strict=True))

    def part(self, index: int, part: tuple[Tensor, Tensor], choices: Choices) -> Summands:
        data, target = part
        with autocast(self.args.amp, self.device):
            loss, jac_loss, _, *mems = self.parallel(
                data,
                target,
                self.mems[index],
                train_step=self.step,
                f_thres=choices.f_thres,
                b_thres=self.args.b_thres,
                compute_jac_loss=choices.jac_weight is not None,
            )
        self.remember(index, mems)
        share = target.shape[1] / self.sequences  # every sequence has the same weight
        losses = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (loss, jac_loss))
        nll, jac_loss = (x.mean() * share for x in losses)
        tokens = torch.full((), target.numel(), device=self.device)
        return Summands(nll, jac_loss, [tokens])

    def remember(self, index: int, mems: list[Tensor]) -> None:
        """Keep the memory that part ``index`` leaves, if the next batch goes on from this one."""

    def forget(self) -> None:
        """Start again without memory: after a skipped step the memory may not be finite."""
        self.mems: list[list[Tensor]] = [[] for _ in range(self.args.batch_chunk)]

    def set_learning_rate(self) -> None:
        self.learning_rate.set(self.step)

    def jac_weight_of(self, step: int) -> float:
        args = self.args
        return jac_loss_weight_at(
            step, args.jac_loss_weight, args.jac_incremental, args.pretrain_steps
        )

    # ---- log -----------------------------------------------------------------------------------

    def due(self) -> tuple[bool, bool, bool]:
        args = self.args
        border = self.step == args.pretrain_steps
        log = self.step % args.log_interval == 0 or border
        validate = self.step % args.eval_interval == 0 or border or self.step == args.max_step
        save = args.save_interval > 0 and self.step % args.save_interval == 0
        return log, validate, save

    def position(self) -> str:
        """Where training is in its data, for the log."""
        raise NotImplementedError

    def in_words(self, loss: float) -> str:
        """The loss in the unit of the data, for the log."""
        return f"ppl {perplexity(loss):.2f}"

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        lr, speed = self.optimizer.param_groups[0]["lr"], self._window["tokens"] / elapsed
        steps = self._window["steps"] + self._window["skipped"]
        values = {"loss": loss, "perplexity": perplexity(loss), "lr": lr, "tokens_per_s": speed}
        return values, (
            f"step {self.step} | {self.position()} | lr {lr:.3g} | "
            f"{1000 * elapsed / steps:.0f} ms/step | {speed:.0f} tok/s | loss {loss:.4f} | "
            f"{self.in_words(loss)}"
        )

    def final_figures(self) -> Iterator[tuple[str, str, dict]]:
        """Evaluate the current weights: name, text for the log, and values of each evaluation."""
        raise NotImplementedError

    # ---- checkpoints ---------------------------------------------------------------------------

    def extra_state(self) -> dict:
        return {"learning_rate": self.learning_rate.state_dict()}

    def load_extra(self, state: dict) -> None:
        self.learning_rate.load_state_dict(state["learning_rate"])

    def fixed(self) -> dict:
        fixed = {f"--{name}": getattr(self.args, name) for name in ("batch_size", "optim")}
        # These two decide for how many parameters the optimiser keeps a state.
        fixed[MODE] = self.args.tie_proj_mode if self.model.ties_projections else None
        fixed |= {name: getattr(self.args, name[2:]) for name in _SINCE}
        return fixed | {VOCABULARY: self.vocab.fingerprint()}

    def fixed_in(self, state: dict) -> dict:
        own = self.fixed()
        return {name: own[name] for name in _SINCE} | state["fixed"]
