"""Training on state tracking: batches, validation and checkpoints of :class:`StateTrainer`."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import ClassVar

import torch
from torch import Tensor

from deq_sequence.model import DEQTransformerLM
from deq_sequence.sequence_trainer import SequenceTrainer
from deq_sequence.state.curriculum import Curriculum
from deq_sequence.state.evaluation import FACTORS, StateEvaluation, evaluate_states, threshold
from deq_sequence.state.strings import StateStrings
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes

_ALONE = Processes()


class StateTrainer(SequenceTrainer):
    """Trains a DEQ-Transformer on strings of group elements, without memory between batches.

    All strings of a batch have one length. A batch of shorter strings has more of them: at least
    ``--batch_size`` * ``--tgt_len`` elements, less a rest. The step's number decides the strings.
    """

    extra_parts: ClassVar = {
        "curriculum": {"longest": 0, "loss": 0.0, "steps": 0},
        **SequenceTrainer.extra_parts,
    }

    def __init__(
        self,
        args: argparse.Namespace,
        model: DEQTransformerLM,
        strings: StateStrings,
        device: torch.device,
        processes: Processes = _ALONE,
        stopping: Stopping | None = None,
    ):
        self.strings = strings
        super().__init__(args, model, strings.vocab, device, processes, stopping)
        self.curriculum = Curriculum(args.tgt_len, args.grow_below)
        self.length = args.tgt_len  # of the current step's strings

    # ---- a step --------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (words, answers) of this process's strings, (1 + length, n) and (length, n)."""
        args = self.args
        self.model.reset_length(args.tgt_len, args.mem_len)
        while self.step < args.max_step:
            self.length = self.curriculum.draw(self.rng)
            self.sequences = args.batch_size * args.tgt_len // self.length
            drawn = self.strings.draw("train", self.step, self.sequences, self.length)
            own = self.processes.part(self.sequences)
            words, answers = (part[:, own].to(self.device) for part in drawn)
            yield words, answers

    def threshold(self) -> int:
        return threshold(self.args, self.length)

    def advance(self, batch: tuple[Tensor, Tensor], loss: float) -> None:
        self.curriculum.observe(self.length, loss)

    # ---- log and validation --------------------------------------------------------------------

    def position(self) -> str:
        return f"length {self.curriculum.longest}"

    def evaluate(self, split: str, length: int, **changes) -> StateEvaluation:
        """Evaluate with the settings of the run, in the phase of the last update."""
        settings = {"args": self.args, "train_step": self.step - 1} | changes
        return evaluate_states(
            self.model,
            self.strings,
            split=split,
            length=length,
            processes=self.processes,
            stop=lambda: self.stopping.wanted,
            **settings,
        )

    def rehearse(self) -> None:
        once = argparse.Namespace(**vars(self.args) | {"max_eval_steps": 1})
        self.evaluate("valid", self.args.tgt_len, args=once, train_step=self.step)

    def final_figures(self) -> Iterator[tuple[str, str, dict]]:
        for factor in FACTORS:
            found = self.evaluate("test", factor * self.args.tgt_len)
            yield f"test_{found.length}", found.text(), asdict(found)

    def validate(self) -> tuple[StateEvaluation, dict, str, float]:
        found = self.evaluate("valid", self.args.tgt_len)
        return found, {"text": found.text()} | asdict(found), "negative loss", -found.loss

    def after_validation(self, found: StateEvaluation) -> None:
        self.learning_rate.after_evaluation(found.loss, self.step)

    # ---- checkpoints ---------------------------------------------------------------------------

    def extra_state(self) -> dict:
        return {"curriculum": self.curriculum.state_dict(), **super().extra_state()}

    def load_extra(self, state: dict) -> None:
        super().load_extra(state)
        self.curriculum.load_state_dict(state["curriculum"])

    def fixed(self) -> dict:
        own = ("tgt_len", "seed", "grow_below")
        return super().fixed() | {f"--{name}": getattr(self.args, name) for name in own}
