"""The audit of a language model: is its hidden state a fixed point? See :mod:`lib.auditing`."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from deq_sequence.finished_run import load_run
from deq_sequence.model import DEQTransformerLM
from deq_sequence.state.evaluation import evaluation_threshold
from deq_sequence.state.strings import StateStrings
from deq_sequence.text.corpus import Corpus
from deq_sequence.text.iterators import LMOrderedIterator
from deq_sequence.text.ngram import UNIGRAM_SMOOTHING
from lib.auditing import Audit, audit
from lib.errors import InputError
from lib.runs.run_folder import WEIGHTS

_FACTORS = (1, 2)  # lengths of strings, in multiples of --tgt_len
MEASURE = "log-likelihood"  # of a word, in nats


def audit_run(folder: Path, samples: int, device: torch.device) -> Audit:
    """Audit the best weights of a run on its test data, with the run's own settings.

    Of a text, a sample is a segment of --eval_tgt_len words, with the memory that the model itself
    has kept. Its score is the mean log-likelihood of its words. Its difficulty is how rare they
    are: their mean -log frequency in the training text.

    Of state tracking, a sample is a string of --tgt_len elements, or of twice as many. Its score
    is whether all its answers are right. Its difficulty is its length.

    All arithmetic is float32.

    Raises:
        InputError: the folder holds no such run, or its text is too short.
    """
    args, data, model = load_run(folder, folder / WEIGHTS, device)
    model.eval()
    audit_data = _audit_strings if isinstance(data, StateStrings) else _audit_text
    return audit_data(model, data, args, samples, device)


def _audit_strings(
    model: DEQTransformerLM, strings: StateStrings, args: argparse.Namespace, samples: int, device
) -> Audit:
    number = math.ceil(samples / len(_FACTORS))
    drawn = [strings.draw("test", 0, number, factor * args.tgt_len) for factor in _FACTORS]

    def forward(words: Tensor) -> Tensor:
        f_thres = evaluation_threshold(args, len(words) - 1)
        return model.log_probs(words, f_thres=f_thres)[1:]  # (L, B, n_token)

    return audit(
        model,
        [(words.to(device), answers.to(device)) for words, answers in drawn],
        correct=lambda p, answers: (p.argmax(-1) == answers).all(dim=0),
        difficulty=lambda p, answers: torch.full(answers.shape[1:], float(len(answers))),
        forward=forward,
        measure="whole strings right",
    )


def _audit_text(
    model: DEQTransformerLM, corpus: Corpus, args: argparse.Namespace, samples: int, device
) -> Audit:
    model.reset_length(args.eval_tgt_len, args.mem_len)
    batch = segments(model, corpus.test, args, samples, device)
    rarity = -_log_frequencies(corpus).to(device)

    def forward(inputs: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
        return model(*inputs, f_thres=args.f_thres, compute_jac_loss=False)[0]  # (L, B)

    return audit(
        model,
        [(batch, batch[1])],
        correct=lambda loss, words: -loss.mean(dim=0),
        difficulty=lambda loss, words: rarity[words].mean(dim=0),
        forward=forward,
        measure=MEASURE,
    )


@torch.no_grad()
def segments(
    model: DEQTransformerLM, text: Tensor, args: argparse.Namespace, samples: int, device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Words (L, B), the words after them (L, B), and memory, of at least ``samples`` segments.

    The segments follow those that fill the memory.

    Raises:
        InputError: the text has fewer segments.
    """
    length, bsz = args.eval_tgt_len, args.eval_batch_size
    before = -(-model.mem_len // length)
    wanted = before + -(-samples // bsz)
    mems: list[Tensor] = []
    found: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    for number, (data, target, seq_len) in enumerate(
        LMOrderedIterator(text, bsz, length, device=device)
    ):
        if number == wanted or seq_len < length:
            break
        if number >= before:
            found.append((data, target, mems))
        *_, z_mem, u_mem = model(data, target, mems, f_thres=args.f_thres, compute_jac_loss=False)
        mems = [z_mem, u_mem]
    if len(found) < wanted - before:
        raise InputError(
            f"the text has {len(found) * bsz} segments of {length} words with a memory, but "
            f"{samples} samples are asked for"
        )
    data, target, mems = zip(*found, strict=True)
    memory = [torch.cat(parts, dim=1) for parts in zip(*mems, strict=True)] if before else []
    return torch.cat(data, dim=1), torch.cat(target, dim=1), memory


def _log_frequencies(corpus: Corpus) -> Tensor:
    """log p(w) of each word in the training text, smoothed as the unigram model is."""
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocab)) + UNIGRAM_SMOOTHING
    return (counts / counts.sum()).log().float()
