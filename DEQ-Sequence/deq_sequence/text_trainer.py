"""Training of language models: the steps, validation and checkpoints of :class:`LMTrainer`."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from deq_sequence.evaluation import Evaluation, evaluate, perplexity, settings_from
from deq_sequence.model import DEQTransformerLM
from deq_sequence.schedules import LearningRate, make_optimizer
from deq_sequence.text.corpus import Corpus
from deq_sequence.text.iterators import LMOrderedIterator
from lib.data_parallel import BalancedDataParallel
from lib.errors import InputError
from lib.jacobian import jac_loss_weight_at
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.task import Care, Choices, Summands
from lib.runs.trainer import Trainer
from lib.solvers.precision import autocast

_ALONE = Processes()
_MODE, _VOCABULARY = "--tie_proj_mode", "the vocabulary"  # keys in ``fixed``


class LMTrainer(Trainer):
    """Trains a DEQ-Transformer on streams of text, with memory from segment to segment.

    Every process reads its own streams of the batch. Any number of processes together reads the
    same tokens in the same order.
    """

    extra_parts = ("epoch", "row", "mems", "learning_rate")
    extra_sums = ("tokens",)

    def __init__(
        self,
        args: argparse.Namespace,
        model: DEQTransformerLM,
        corpus: Corpus,
        device: torch.device,
        processes: Processes = _ALONE,
        stopping: Stopping | None = None,
    ):
        self.args, self.corpus = args, corpus
        self.streams = processes.part(args.batch_size)
        own = self.streams.stop - self.streams.start
        if own < args.batch_chunk:
            raise InputError(
                f"--batch_size {args.batch_size} leaves a process {own} sequences, too few for "
                f"--batch_chunk {args.batch_chunk}: lower the latter, or start fewer processes"
            )
        self.iterator = LMOrderedIterator(
            corpus.train, args.batch_size, args.tgt_len, device=device, streams=self.streams
        )
        for text in (corpus.valid, corpus.test):  # refuse too short a text now, not in evaluation
            LMOrderedIterator(text, args.eval_batch_size, args.eval_tgt_len)
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
                weight_decay=args.weight_decay,
                resume="--restart",
                way_out="lower --lr, or raise --jac_loss_weight",
            ),
            stopping=stopping or Stopping(args.max_time),
        )
        self.learning_rate = LearningRate(args, self.optimizer)
        if args.clip_nonemb:  # leaves out parameters tied to the embeddings, too
            left_out = {id(p) for p in model.word_emb.parameters()}
            left_out |= {id(model.get_parameter(t.ours)) for t in model.ties if t.mode != "apart"}
            self.clipped = [p for p in model.parameters() if id(p) not in left_out]
        if args.multi_gpu and torch.cuda.device_count() > 1 and device.type == "cuda":
            share = args.gpu0_bsz // args.batch_chunk if args.gpu0_bsz >= 0 else -1
            # loss, jac_loss, sradius, z_mem, u_mem
            self.parallel = BalancedDataParallel(model, share, 1, output_dims=(1, None, 0, 1, 1))
        self.last_step, self.pretrain_steps = args.max_step, args.pretrain_steps
        self.step = args.start_train_steps
        self.epoch, self.row = 0, 0
        self.forget()

    # ---- a step --------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield segments (data, target) of this process's streams, (tgt_len, streams) each."""
        args = self.args
        self.model.reset_length(args.tgt_len, args.mem_len)
        while self.step < args.max_step:
            batches = (
                self.iterator.iterate_varlen(self.row, self.rng)
                if args.varlen
                else self.iterator.iterate(self.row)
            )
            for data, target, _ in batches:
                yield data, target
                if self.step >= args.max_step:
                    return
            # A new pass over the text begins without memory, as the first pass did.
            self.epoch, self.row = self.epoch + 1, 0
            self.forget()

    def draw(self) -> Choices:
        # Two draws in every step, so that the random stream does not depend on the phase.
        f_thres = max(1, self.args.f_thres - self.rng.randint(0, self.args.rand_f_thres_delta))
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
        self.mems[index] = mems  # of the same streams in the next segment
        share = target.shape[1] / self.args.batch_size  # every sequence has the same weight
        losses = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (loss, jac_loss))
        nll, jac_loss = (x.mean() * share for x in losses)
        tokens = torch.full((), target.numel(), device=self.device)
        return Summands(nll, jac_loss, [tokens])

    def set_learning_rate(self) -> None:
        self.learning_rate.set(self.step)

    def advance(self, batch: tuple[Tensor, Tensor]) -> None:
        self.row += len(batch[1])

    def forget(self) -> None:
        """Start again without memory: after a skipped step the memory may not be finite."""
        self.mems: list[list[Tensor]] = [[] for _ in range(self.args.batch_chunk)]

    def jac_weight_of(self, step: int) -> float:
        args = self.args
        return jac_loss_weight_at(
            step, args.jac_loss_weight, args.jac_incremental, args.pretrain_steps
        )

    # ---- log and validation --------------------------------------------------------------------

    def due(self) -> tuple[bool, bool, bool]:
        args = self.args
        border = self.step == args.pretrain_steps
        log = self.step % args.log_interval == 0 or border
        validate = self.step % args.eval_interval == 0 or border or self.step == args.max_step
        save = args.save_interval > 0 and self.step % args.save_interval == 0
        return log, validate, save

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        lr, speed = self.optimizer.param_groups[0]["lr"], self._window["tokens"] / elapsed
        steps = self._window["steps"] + self._window["skipped"]
        values = {"loss": loss, "perplexity": perplexity(loss), "lr": lr, "tokens_per_s": speed}
        figure = f"ppl {perplexity(loss):.2f}"
        if self.corpus.characters:
            figure = f"bpc {loss / math.log(2):.4f}"
        return values, (
            f"step {self.step} | epoch {self.epoch} | lr {lr:.3g} | "
            f"{1000 * elapsed / steps:.0f} ms/step | {speed:.0f} tok/s | loss {loss:.4f} | {figure}"
        )

    def evaluate_text(self, data: Tensor) -> Evaluation:
        """Evaluate with the settings of the run, in the phase of the last update."""
        return evaluate(
            self.model,
            data,
            train_step=self.step - 1,
            processes=self.processes,
            stop=lambda: self.stopping.wanted,
            **settings_from(self.args),
        )

    def validate(self) -> tuple[Evaluation, dict, str, float]:
        found = self.evaluate_text(self.corpus.valid)
        record = {
            "perplexity": found.perplexity,
            "text": found.text(self.corpus.characters),
        }
        record |= {name: value for name, value in asdict(found).items() if value is not None}
        return found, record, "negative loss", -found.loss

    def after_validation(self, found: Evaluation) -> None:
        self.learning_rate.after_evaluation(found.loss, self.step)

    # ---- checkpoints ---------------------------------------------------------------------------

    def extra_state(self) -> dict:
        """The position in the text, the memory of all streams of the batch (on the CPU), and the
        state of the learning-rate schedule."""
        own = [torch.cat(parts, dim=1).cpu() for parts in zip(*self.mems, strict=True)]
        parts = self.processes.gather(own)  # per process: [] or [states, injections]
        return {
            "epoch": self.epoch,
            "row": self.row,
            "mems": [torch.cat(streams, dim=1) for streams in zip(*parts, strict=True)],
            "learning_rate": self.learning_rate.state_dict(),
        }

    def load_extra(self, state: dict) -> None:
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.epoch, self.row = state["epoch"], state["row"]
        self.forget()
        if state["mems"]:
            own = (m[:, self.streams].to(self.device) for m in state["mems"])
            self.mems = [list(part) for part in self.split(tuple(own))]

    def fixed(self) -> dict:
        fixed = {f"--{name}": getattr(self.args, name) for name in ("batch_size", "optim")}
        # The mode decides for how many parameters the optimiser keeps a state.
        fixed[_MODE] = self.args.tie_proj_mode if self.model.ties_projections else None
        return fixed | {_VOCABULARY: self.corpus.vocab.fingerprint()}

    def fixed_in(self, state: dict) -> dict:
        own, fixed = self.fixed(), dict(state["fixed"])
        fixed.setdefault(_MODE, "shared")  # older checkpoints: the only mode then
        # None: a model without tied projections. If only one has them, load_state() names the
        # differing weights, a better message than one about the mode.
        if own[_MODE] is None or fixed[_MODE] is None:
            fixed[_MODE] = own[_MODE]
        # Older checkpoints: character vocabularies were counted in the training text alone.
        counts = torch.bincount(self.corpus.train, minlength=len(self.corpus.vocab))
        changed = self.corpus.characters and bool((counts[:-1] <= counts[1:]).any())
        once = "of the training text alone" if changed else own[_VOCABULARY]
        return {_VOCABULARY: once} | fixed
