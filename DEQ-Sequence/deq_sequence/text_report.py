"""The report of a finished run: a table, curves, and a text sample from the model."""

import argparse
import math
from pathlib import Path

import torch

from deq_sequence.evaluation import evaluate, settings_from
from deq_sequence.generation import continuation
from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.corpus import OWN, Corpus
from deq_sequence.text.ngram import kneser_ney_bigram_perplexity, unigram_perplexity
from lib.errors import InputError
from lib.runs.figures import BEFORE, CURVES, draw_curves, series, solver_rows, table
from lib.runs.run_folder import peak_memory_mib, read_metrics

_PROMPTS = ("this function returns", "the object is")  # of the demo text
_PROMPT_LENGTH = {False: 3, True: 30}  # words or bytes of a prompt from the test text
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
        lambda axes: draw_perplexity(axes, records, ngrams),
    )
    stacked = args.max_step <= args.pretrain_steps
    ended = "stacked (end of training)" if stacked else "equilibrium"
    before = _stacked(records)

    def shown(perplexity: float) -> str:
        return f"{math.log2(perplexity):.3f}" if corpus.characters else f"{perplexity:.1f}"

    rows = [
        ("bits per character" if corpus.characters else "perplexity", "valid", "test"),
        *(
            (title, *(shown(ngrams[f"{name}_{split}"]) for split in ("valid", "test")))
            for title, name in (("unigram", "unigram"), ("Kneser-Ney bigram", "bigram"))
        ),
        *(() if stacked else [(BEFORE, "none" if before is None else shown(before), "")]),
        (ended, shown(_perplexity(valid)), shown(_perplexity(test))),
        ("test / unigram", "", f"{_perplexity(test) / ngrams['unigram_test']:.3f}"),
        ("", "", ""),
        *solver_rows(records, args.pretrain_steps, test),
        ("", "", ""),
        ("spectral radius (valid)", f"{solved.sradius:.3f}", ""),
        ("peak memory", f"{peak_memory_mib(device):.0f} MiB", ""),
    ]
    lines = [*table(rows), "", f"curves: {folder / CURVES}", "", "a few words from the model:"]
    lines += [continuation(model, corpus.vocab, p, args.f_thres) for p in prompts(corpus)]
    return "\n".join(lines)


def prompts(corpus: Corpus) -> list[list[str]]:
    """Beginnings of text: known words of _PROMPTS, or the beginning of the user's own test text."""
    vocab = corpus.vocab
    if corpus.dataset == OWN:
        return [vocab.decode(corpus.test[: _PROMPT_LENGTH[corpus.characters]])]
    return [[word for word in p.split() if word in vocab.sym2idx] for p in _PROMPTS]


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


def draw_perplexity(axes, records: list[dict], ngrams: dict[str, float]) -> None:
    """Draw training and validation perplexity over the steps, and any n-gram perplexities."""
    for kind, style, label in (("train", "-", "training"), ("valid", "o-", "validation")):
        steps, losses = series(records, kind, "loss")
        axes.plot(steps, _exp(losses), style, label=label)
    for name, style in (("unigram", ":"), ("bigram", "--")) if ngrams else ():
        axes.axhline(ngrams[f"{name}_valid"], color="grey", ls=style, lw=1, label=f"{name} (valid)")
    axes.set(yscale="log", ylabel="perplexity")


def _exp(losses: list[float]) -> list[float]:
    return torch.tensor(losses).exp().tolist()


def _perplexity(record: dict) -> float:
    return _exp([record["loss"]])[0]


def _stacked(records: list[dict]) -> float | None:
    """Validation perplexity at the end of the stacked phase, if there was one."""
    stacked = [r for r in records if r.get("phase") == "stacked"]
    losses = series(stacked, "valid", "loss")[1]
    return _exp(losses)[-1] if losses else None
