"""Training of language models: the text, validation and checkpoints of :class:`LMTrainer`."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import ClassVar

import torch
from torch import Tensor

from deq_sequence.evaluation import Evaluation, evaluate, settings_from
from deq_sequence.events import TextEvents
from deq_sequence.model import DEQTransformerLM
from deq_sequence.sequence_trainer import MODE, VOCABULARY, SequenceTrainer
from deq_sequence.text.corpus import Corpus
from deq_sequence.text.iterators import LMOrderedIterator
from lib.runs.checkpoint import check_form
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes

_ALONE = Processes()
_TEXT = "the text of"  # a key in ``fixed``


class LMTrainer(SequenceTrainer):
    """Trains a DEQ-Transformer on streams of text, with memory from segment to segment.

    Every process reads its own streams of the batch. Any number of processes together reads the
    same tokens in the same order.
    """

    extra_parts: ClassVar = {"epoch": 0, "row": 0, "mems": ..., **SequenceTrainer.extra_parts}

    def __init__(
        self,
        args: argparse.Namespace,
        model: DEQTransformerLM,
        corpus: Corpus,
        device: torch.device,
        processes: Processes = _ALONE,
        stopping: Stopping | None = None,
    ):
        self.corpus = corpus
        super().__init__(args, model, corpus.vocab, device, processes, stopping)
        self.iterator = LMOrderedIterator(
            corpus.train, args.batch_size, args.tgt_len, device=device, streams=self.streams
        )
        for text in (corpus.valid, corpus.test):  # refuse too short a text now, not in evaluation
            LMOrderedIterator(text, args.eval_batch_size, args.eval_tgt_len)
        self.epoch, self.row = 0, 0
        self.text = corpus.fingerprint()
        self.events = TextEvents()

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

    def advance(self, batch: tuple[Tensor, Tensor], loss: float) -> None:
        self.row += len(batch[1])
        self.mems = [self.coming.get(i, old) for i, old in enumerate(self.mems)]
        self.coming = {}

    def remember(self, index: int, mems: list[Tensor]) -> None:
        self.coming[index] = mems  # of the same streams in the next segment

    def forget(self) -> None:
        super().forget()
        self.coming: dict[int, list[Tensor]] = {}

    # ---- log and validation --------------------------------------------------------------------

    def position(self) -> str:
        return f"epoch {self.epoch}"

    def in_words(self, loss: float) -> str:
        return f"bpc {loss / math.log(2):.4f}" if self.corpus.characters else super().in_words(loss)

    def evaluate_text(self, data: Tensor, **changes) -> Evaluation:
        """Evaluate with the settings of the run, in the phase of the last update."""
        settings = {"train_step": self.step - 1} | settings_from(self.args) | changes
        return evaluate(
            self.model,
            data,
            processes=self.processes,
            stop=lambda: self.stopping.wanted,
            **settings,
        )

    def rehearse(self) -> None:
        self.evaluate_text(self.corpus.valid, train_step=self.step, max_steps=1)

    def final_figures(self) -> Iterator[tuple[str, str, dict]]:
        for split in ("valid", "test"):
            found = self.evaluate_text(getattr(self.corpus, split))
            values = {k: v for k, v in asdict(found).items() if v is not None}
            yield split, found.text(self.corpus.characters), values

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
        self.events.curves(self.run, self.step, self.pretrain_steps)
        if not self.args.compile:  # each length of a text would be compiled
            args = self.model, self.corpus, self.args.f_thres
            self.events.sample(self.run, self.step, *args)

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
            **super().extra_state(),
        }

    def load_extra(self, state: dict) -> None:
        super().load_extra(state)
        self.epoch, self.row = state["epoch"], state["row"]
        self.forget()
        if state["mems"] != []:
            self._check_memory(state["mems"])
            own = (m[:, self.streams].to(self.device) for m in state["mems"])
            self.mems = [list(part) for part in self.split(tuple(own))]

    def fixed(self) -> dict:
        return super().fixed() | {_TEXT: self.text}

    def _check_memory(self, mems) -> None:
        """Refuse anything else than the states and injections of the last rows."""
        check_form(mems, [..., ...], "mems")
        rows = min(len(m) if isinstance(m, Tensor) and m.dim() else 0 for m in mems)
        for found, channels in zip(mems, (1, 3), strict=True):
            dtype = next(self.model.parameters()).dtype
            if getattr(found, "dtype", None) == torch.bfloat16:  # from autocast
                dtype = torch.bfloat16
            shape = min(rows, self.row), self.sequences, channels * self.model.d_model
            check_form(found, torch.empty(shape, dtype=dtype, device="meta"), "mems")

    def fixed_in(self, state: dict) -> dict:
        own, fixed = self.fixed(), super().fixed_in(state)
        fixed.setdefault(_TEXT, own[_TEXT])
        fixed.setdefault(MODE, "shared")  # older checkpoints: the only mode then
        # None: a model without tied projections. If only one has them, load_state() names the
        # differing weights, a better message than one about the mode.
        if own[MODE] is None or fixed[MODE] is None:
            fixed[MODE] = own[MODE]
        # Older checkpoints: character vocabularies were counted in the training text alone.
        counts = torch.bincount(self.corpus.train, minlength=len(self.corpus.vocab))
        changed = self.corpus.characters and bool((counts[:-1] <= counts[1:]).any())
        once = "of the training text alone" if changed else own[VOCABULARY]
        return {VOCABULARY: once} | fixed
