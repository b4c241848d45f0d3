"""What a finished run amounts to: a table, its curves, and a few words from the model."""

import argparse
from pathlib import Path

import torch

from deq_sequence.corpus import Corpus
from deq_sequence.evaluation import evaluate, settings_from
from deq_sequence.generation import generate
from deq_sequence.model import DEQTransformerLM
from deq_sequence.ngram import kneser_ney_bigram_perplexity, unigram_perplexity
from lib.errors import InputError
from lib.experiment import peak_memory_mib, read_metrics

CURVES = "curves.png"
_PROMPTS = ("this function returns", "the object is")
_SRADIUS_SEGMENTS = 2  # of the validation text; 150 products with the Jacobian each


def report(args: argparse.Namespace, folder: Path, model: DEQTransformerLM, corpus: Corpus) -> str:
    """Table of a run's figures, measured on its own text; also draws ``curves.png``.

    Args:
        args: the run's settings.
        folder: the run's folder, trained to its end.
        model: the model with its final weights.
        corpus: the text that it was trained on.
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
    steps = _mean_over_equilibrium(records, args.pretrain_steps)
    test, valid = _final(records, "final_test"), _final(records, "final_valid")
    draw_curves(records, args.pretrain_steps, ngrams, folder / CURVES)
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
        ("equilibrium solves", "rel. residual", "nfe"),
        ("forward, training mean", *_pair(steps, "forward")),
        ("backward, training mean", *_pair(steps, "backward")),
        ("forward, evaluation mean", f"{test['rel_residual']:.2e}", f"{test['nfe']:.1f}"),
        ("", "", ""),
        ("spectral radius (valid)", f"{solved.sradius:.3f}", ""),
        ("peak memory", f"{peak_memory_mib(device):.0f} MiB", ""),
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{a:<{width}}  {b:>14}  {c:>10}".rstrip() for a, b, c in rows]
    lines += ["", f"curves: {folder / CURVES}", "", "a few words from the model:"]
    for prompt in _PROMPTS:
        known = [word for word in prompt.split() if word in corpus.vocab.sym2idx] or ["<eos>"]
        words = generate(model, corpus.vocab, known, 40, temperature=0.7, f_thres=args.f_thres)
        lines.append(f"[{' '.join(known)}] {' '.join(words).replace('<eos>', '/')}")
    return "\n".join(lines)


def draw_curves(records: list[dict], border: int, ngrams: dict[str, float], path: Path) -> None:
    """Perplexity over steps with both phases, and the residuals of both solves."""
    # Here, not above: drawing is optional for training, and its import is slow.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    solved = [r for r in train if "forward_rel_residual" in r]
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot([r["step"] for r in train], _exp([r["loss"] for r in train]), label="training")
    top.plot([r["step"] for r in valid], _exp([r["loss"] for r in valid]), "o-", label="validation")
    for name, style in (("unigram", ":"), ("bigram", "--")):
        top.axhline(ngrams[f"{name}_valid"], color="grey", ls=style, lw=1, label=f"{name} (valid)")
    top.set(yscale="log", ylabel="perplexity", title="stacked pre-training, then equilibrium")
    top.legend()
    for which in ("forward", "backward"):
        residuals = [r.get(f"{which}_rel_residual") for r in solved]
        bottom.plot([r["step"] for r in solved], residuals, label=f"{which} residual")
    bottom.set(yscale="log", xlabel="step", ylabel="relative residual")
    if solved:
        bottom.legend()
    for axes in (top, bottom):
        axes.axvline(border, color="black", lw=0.8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _exp(losses: list[float]) -> list[float]:
    return torch.tensor(losses).exp().tolist()


def _perplexity(record: dict) -> float:
    return _exp([record["loss"]])[0]


def _final(records: list[dict], kind: str) -> dict:
    found = [r for r in records if r["kind"] == kind]
    if not found:
        raise InputError(f"the run has no {kind} record: train it to its end first")
    return found[-1]


def _stacked(records: list[dict]) -> str:
    """Validation perplexity at the end of the stacked phase."""
    found = [r for r in records if r["kind"] == "valid" and r["phase"] == "stacked"]
    return f"{_perplexity(found[-1]):.1f}" if found else "none"


def _mean_over_equilibrium(records: list[dict], border: int) -> dict[str, float]:
    solved = [r for r in records if r["kind"] == "train" and "backward_nfe" in r]
    solved = [r for r in solved if r["step"] > border]
    names = [f"{w}_{n}" for w in ("forward", "backward") for n in ("rel_residual", "nfe")]
    return {name: sum(r[name] for r in solved) / max(len(solved), 1) for name in names}


def _pair(means: dict[str, float], which: str) -> tuple[str, str]:
    return f"{means[f'{which}_rel_residual']:.2e}", f"{means[f'{which}_nfe']:.1f}"
