"""The report of a finished run: a table, curves, and a text sample from the model."""

import argparse
from pathlib import Path

import torch

from deq_sequence.evaluation import evaluate, settings_from
from deq_sequence.generation import generate
from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.corpus import Corpus
from deq_sequence.text.ngram import kneser_ney_bigram_perplexity, unigram_perplexity
from lib.errors import InputError
from lib.runs.finished_run import CURVES, draw_curves, series, solver_rows, table
from lib.runs.run_folder import peak_memory_mib, read_metrics

_PROMPTS = ("this function returns", "the object is")
_SRADIUS_SEGMENTS = 2  # segments of the validation text, 150 Jacobian products each


def report(args: argparse.Namespace, folder: Path, model: DEQTransformerLM, corpus: Corpus) -> str:
    """Return the report of a run as text; also draw ``curves.png``.

    Args:
        args: the run's settings.
        folder: the folder of the finished run.
        model: the model with its final weights.
        corpus: the text on which the model was trained.
    """
    records = read_metrics(folder)
    device = next(model.parameters()).device
    n_token = len(corpus.vocab)
    ngrams = {
        f"{name}_{split}": figure(corpus.train, getattr(corpus, split), n_token)
        for name, figure in (
            ("unigram", unigram_perplexity),
            ("bigram", kneser_ney_bigram_perplexity),
        )
        for split in ("valid", "test")
    }
    options = settings_from(args) | {"max_steps": _SRADIUS_SEGMENTS, "spectral_radius": True}
    solved = evaluate(model, corpus.valid, **options)
    test, valid = last_record(records, "final_test"), last_record(records, "final_valid")
    draw_curves(
        records,
        args.pretrain_steps,
        folder / CURVES,
        lambda axes: _draw_perplexity(axes, records, ngrams),
    )
    stacked = args.max_step <= args.pretrain_steps
    ended = "stacked (end of training)" if stacked else "equilibrium"
    rows = [
        ("perplexity", "valid", "test"),
        ("unigram", f"{ngrams['unigram_valid']:.1f}", f"{ngrams['unigram_test']:.1f}"),
        ("Kneser-Ney bigram", f"{ngrams['bigram_valid']:.1f}", f"{ngrams['bigram_test']:.1f}"),
        ("stacked (end of pre-training)", _stacked(records), ""),
        (ended, f"{_perplexity(valid):.1f}", f"{_perplexity(test):.1f}"),
        ("test / unigram", "", f"{_perplexity(test) / ngrams['unigram_test']:.3f}"),
        ("", "", ""),
        *solver_rows(records, args.pretrain_steps, test),
        ("", "", ""),
        ("spectral radius (valid)", f"{solved.sradius:.3f}", ""),
        ("peak memory", f"{peak_memory_mib(device):.0f} MiB", ""),
    ]
    lines = [*table(rows), "", f"curves: {folder / CURVES}", "", "a few words from the model:"]
    for prompt in _PROMPTS:
        known = [word for word in prompt.split() if word in corpus.vocab.sym2idx] or ["<eos>"]
        words = generate(model, corpus.vocab, known, 40, temperature=0.7, f_thres=args.f_thres)
        lines.append(f"[{' '.join(known)}] {' '.join(words).replace('<eos>', '/')}")
    return "\n".join(lines)


def last_record(records: list[dict], kind: str, **values) -> dict:
    """The last record of ``kind`` with these values.

    Raises:
        InputError: there is none, so the run is not finished.
    """
    wanted = {"kind": kind, **values}
    found = [r for r in records if wanted.items() <= r.items()]
    if not found:
        raise InputError(f"the run has no {kind} record: train it to its end first")
    return found[-1]


def _draw_perplexity(axes, records: list[dict], ngrams: dict[str, float]) -> None:
    """Draw training and validation perplexity over the steps, and the n-gram perplexities."""
    for kind, style, label in (("train", "-", "training"), ("valid", "o-", "validation")):
        steps, losses = series(records, kind, "loss")
        axes.plot(steps, _exp(losses), style, label=label)
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(ngrams[f"{name}_valid"], color="grey", ls=style, lw=1, label=f"{name} (valid)")
    axes.set(yscale="log", ylabel="perplexity")


def _exp(losses: list[float]) -> list[float]:
    return torch.tensor(losses).exp().tolist()


def _perplexity(record: dict) -> float:
    return _exp([record["loss"]])[0]


def _stacked(records: list[dict]) -> str:
    """Validation perplexity at the end of the stacked phase."""
    stacked = [r for r in records if r.get("phase") == "stacked"]
    losses = series(stacked, "valid", "loss")[1]
    return f"{_exp(losses)[-1]:.1f}" if losses else "none"
