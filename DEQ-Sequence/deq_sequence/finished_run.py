"""The model of a run, from its folder; and batches of the run's training data, for single steps."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deq_sequence.command import build_model, read_corpus
from deq_sequence.model import DEQTransformerLM
from deq_sequence.own_settings import check_vocabulary, read_settings
from deq_sequence.sequence_trainer import SequenceTrainer
from deq_sequence.state.strings import StateStrings, get_state_strings, is_state
from deq_sequence.state.trainer import StateTrainer
from deq_sequence.text.corpus import Corpus
from deq_sequence.text_trainer import LMTrainer
from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from lib.runs.run_folder import SETTINGS
from lib.runs.task import Choices

Batch = tuple[Tensor, Tensor]


def load_run(
    folder: Path, weights: Path, device: torch.device
) -> tuple[argparse.Namespace, Corpus | StateStrings, DEQTransformerLM]:
    """The settings of a run, its data, and its model with the weights of a file.

    f is neither compiled nor recorded in graphs: both take longer than a few calls. All is done on
    one device.

    Raises:
        InputError: the folder holds no such run, or the weights are of another model.
    """
    args = read_settings(folder / SETTINGS)
    args.compile = args.graph = args.multi_gpu = False
    states = is_state(args.dataset)
    data = get_state_strings(args.dataset, args.seed) if states else read_corpus(args)
    check_vocabulary(folder, data.vocab)
    model = build_model(args, data, device)
    load_weights(model, weights)
    return args, data, model


def training_of(
    folder: Path, weights: Path, number: int, device: torch.device
) -> tuple[SequenceTrainer, int, Iterator[Batch]]:
    """A trainer at equilibrium, the forward threshold of its steps, and batches for ``part``.

    A text gives segments at equal distances; while one is the current batch, the trainer has the
    memory that the segments before it leave. State tracking gives strings of --tgt_len.
    Where thresholds are drawn, the threshold is their upper end. Half precision is off.

    Raises:
        InputError: as for :func:`load_run`, or the text is too short.
    """
    args, data, model = load_run(folder, weights, device)
    args.amp = "none"
    kind = StateTrainer if isinstance(data, StateStrings) else LMTrainer
    trainer = kind(args, model, data, device)
    trainer.step = -1  # no step of the stacked phase
    model.reset_length(args.tgt_len, args.mem_len)
    batches = _strings if isinstance(trainer, StateTrainer) else _segments
    return trainer, trainer.threshold(), batches(trainer, number)


def _strings(trainer: StateTrainer, number: int) -> Iterator[Batch]:
    args = trainer.args
    for step in range(number):
        words, answers = trainer.strings.draw("train", step, args.batch_size, args.tgt_len)
        yield words.to(trainer.device), answers.to(trainer.device)


def _segments(trainer: LMTrainer, number: int) -> Iterator[Batch]:
    length, text = trainer.args.tgt_len, trainer.iterator
    before = -(-trainer.model.mem_len // length)  # segments that fill the memory
    apart = (text.rows - 1) // length // number
    if apart <= before:
        raise InputError(
            f"the training text has {(text.rows - 1) // length} segments of {length} words, too "
            f"few for {number} batches with a memory: ask for fewer"
        )
    for first in range(0, number * apart, apart):
        trainer.forget()
        for segment in range(first, first + before):
            _pass(trainer, text.get_batch(segment * length)[:2])
        yield text.get_batch((first + before) * length)[:2]


@torch.no_grad()
def _pass(trainer: LMTrainer, batch: Batch) -> None:
    """Keep the memory that a batch leaves."""
    for index, part in enumerate(trainer.split(batch)):
        trainer.part(index, part, Choices(trainer.threshold()))
    trainer.advance(batch, 0.0)
