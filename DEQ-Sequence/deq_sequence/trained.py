"""The use of a trained language model: load it, let it continue a text, ask for a perplexity.

import deq_sequence
model = deq_sequence.load("docs/models/words.safetensors")
print(model.generate("this function returns"))
"""

import argparse
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deq_sequence.command import model_for, read_corpus
from deq_sequence.evaluation import Evaluation, evaluate, perplexity
from deq_sequence.generation import generate
from deq_sequence.model import DEQTransformerLM
from deq_sequence.options import data_name, text_rules
from deq_sequence.own_settings import (
    VOCABULARY,
    WORDS,
    check_vocabulary,
    of_the_model,
    read_saved,
    settings_of,
)
from deq_sequence.state.strings import is_state
from deq_sequence.text.corpus import DATASETS
from deq_sequence.text.vocabulary import EOS, ByteVocab, Vocab
from lib.errors import InputError, check, naming
from lib.gradients import unused_settings
from lib.runs.checkpoint import load_state
from lib.runs.figures import finite
from lib.runs.model_file import ModelFile, find_device, read_model_file
from lib.runs.run_folder import SETTINGS

KIND = "language model"
# Settings that a card shows: those that shape the model and its training.
_SHOWN = (
    "d_model n_head d_head d_inner pre_lnorm wnorm inject adaptive cutoffs div_val tgt_len mem_len "
    "f_start f_solver f_thres eval_state stop_mode grad b_solver b_thres pretrain_steps max_step "
    "batch_size optim lr scheduler dropout dropatt jac_loss_weight jac_loss_freq seed"
).split()

_TEXTS = {
    "wt103": "WikiText-103",
    "wt2": "WikiText-2",
    "ptb": "the Penn Treebank",
    "enwik8": "enwik8",
    "text8": "text8",
    "demo": "the docstrings, comments and help topics of Python's standard library",
    "text": "a text of its user",
}


@dataclass(frozen=True)
class TrainedModel:
    """A trained language model, ready for use.

    Attributes:
        model: the network, in evaluation mode.
        vocabulary: its words (or bytes) and their ids.
        settings: those of its run.
        figures: by kind of record, the last figures of its run, such as ``final_test``.
    """

    model: DEQTransformerLM
    vocabulary: Vocab
    settings: argparse.Namespace
    figures: dict[str, dict]

    @property
    def is_of_bytes(self) -> bool:
        """Whether the symbols are bytes, not words."""
        return isinstance(self.vocabulary, ByteVocab)

    def generate(
        self,
        prompt: str = "",
        words: int = 50,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that follows ``prompt``: ``words`` symbols, drawn one by one.

        Arguments are those of :func:`deq_sequence.generation.generate`. Without a prompt the text
        begins after the end of a line.
        """
        drawn = generate(
            self.model,
            self.vocabulary,
            self.begin(prompt),
            words,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            f_thres=self.settings.f_thres,
            seed=seed,
        )
        return self.vocabulary.join(drawn)

    def begin(self, prompt: str) -> list[str]:
        """The symbols of a prompt; an empty one is the end of a line.

        Raises:
            InputError: the vocabulary lacks a symbol, and has no ``<unk>``.
        """
        check(isinstance(prompt, str), "prompt", prompt, "a text")
        return self.vocabulary.symbols(prompt or "\n") or [EOS]

    def unknown(self, text: str) -> list[str]:
        """The words of a text for which ``<unk>`` stands."""
        text = text.lower() if self.vocabulary.lower_case else text
        return [word for word in text.split() if word not in self.vocabulary.sym2idx]

    def encode(self, text: str, source: str = "text") -> Tensor:
        """The ids of a text, (tokens,); every line of words ends with ``<eos>``.

        Raises:
            InputError: it has fewer than two tokens, or one that the vocabulary lacks.
        """
        check(isinstance(text, str), "text", text, "a text")
        if self.is_of_bytes:
            text = text.lower() if self.vocabulary.lower_case else text
            ids = self.vocabulary.encode([text.encode()], source)
        else:
            ids = self.vocabulary.encode(io.StringIO(text), source)  # lines as of a file
        return self.checked(ids, source)

    def checked(self, ids: Tensor, source: str) -> Tensor:
        """The ids of a text, refused if they are fewer than two."""
        if len(ids) < 2:
            raise InputError(f"{source} has {len(ids)} tokens: a perplexity needs two or more")
        return ids

    def evaluate(self, text: str, **changes) -> Evaluation:
        """Loss, evaluations and residual on a text, as one stream with memory.

        The first token has no word before it, so it counts as given. ``changes`` are arguments of
        :func:`deq_sequence.evaluation.evaluate`, such as ``mem_len`` and ``f_thres``; the others
        are those of the run.
        """
        args = self.settings
        options = {"tgt_len": args.eval_tgt_len, "mem_len": args.mem_len, "f_thres": args.f_thres}
        return evaluate(self.model, self.encode(text), **{"batch_size": 1} | options | changes)

    def perplexity(self, text: str) -> float:
        """exp of the mean -log p of the tokens of ``text``, from its second one on."""
        return self.evaluate(text).perplexity


def load(path: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Load a trained language model: a run's folder, or a file of scripts/export_weights.py.

    Raises:
        InputError: there is no such model or device, or the file is damaged.
    """
    device = find_device(device)
    return build(read_model_file(path, KIND, of_run), device)


def build(found: ModelFile, device: torch.device) -> TrainedModel:
    """The model that a file or a run describes."""
    with naming(str(found.path)):
        args = settings_of(found.settings)
    vocab = _vocabulary(args, found.names)
    if found.settings.get(VOCABULARY) not in (None, vocab.fingerprint()):
        raise InputError(
            f"{found.path} is damaged: its vocabulary is {vocab.fingerprint()}, and its settings "
            f"say {found.settings[VOCABULARY]}"
        )
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        model = model_for(args, len(vocab))
    load_state(model, found.state, str(found.path))
    model.reset_length(args.eval_tgt_len, args.mem_len)
    return TrainedModel(model.to(device).eval(), vocab, args, found.figures)


def of_run(folder: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Kind, settings and words of the run in a folder, for :mod:`lib.runs.model_file`.

    A run that has no vocabulary.json is an older one: its words are read from its text again.

    Raises:
        InputError: the folder holds no run of words, or its vocabulary is lost.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder} holds no run of DEQ-Sequence: {SETTINGS} is missing")
    saved = read_saved(path)
    with naming(str(path)):
        args = settings_of(saved)
    if is_state(args.dataset):
        raise InputError(f"{folder} is a run of {args.dataset}, not of a language model")
    return KIND, of_the_model(saved), _words_of_run(folder, args, saved)


def _words_of_run(folder: Path, args: argparse.Namespace, saved: dict[str, Any]) -> list[str]:
    path = folder / WORDS
    if path.is_file():
        try:
            words = json.loads(path.read_text("utf-8"))
            whole = isinstance(words, list) and all(isinstance(word, str) for word in words)
            "\0".join(words if whole else []).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError):
            whole = False
        if not whole or saved.get(VOCABULARY) != Vocab.from_symbols(words).fingerprint():
            raise InputError(f"{path} is not the vocabulary of the run: restore or delete it")
        return words
    args.data = saved.get("data", args.data)
    if not Path(args.data).exists():
        raise InputError(
            f"{path} is missing, and so is the text of the run ({args.data}), from which its "
            "vocabulary could be read: restore one of them"
        )
    vocab = read_corpus(args).vocab
    check_vocabulary(folder, vocab)
    return vocab.idx2sym


def _vocabulary(args: argparse.Namespace, names: list[str]) -> Vocab:
    rules = text_rules(args) or DATASETS[args.dataset]
    kind = ByteVocab if rules.characters else Vocab
    return kind.from_symbols(names, lower_case=rules.lower_case)


def facts(found: ModelFile) -> dict[str, Any]:
    """What the card of a model says (scripts/model_card.py)."""
    trained = build(found, torch.device("cpu"))
    args, model = trained.settings, trained.model
    symbols = "bytes" if trained.is_of_bytes else "words"
    unused = unused_settings(model.grad)
    return {
        "title": f"A DEQ-Transformer trained on {data_name(args)}",
        "about": (
            f"A {found.kind} (arXiv 1909.01377): its hidden states are the fixed point of one "
            f"transformer layer f. Its vocabulary has {len(trained.vocabulary):,} {symbols}."
        ),
        "equation": (
            "z = f(z; u, m), with u the injected words and m the last "
            f"{args.mem_len} states; log p = log-softmax of a linear map of z"
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": _figures(found.figures, trained.is_of_bytes),
        "settings": {
            name: getattr(args, name)
            for name in _SHOWN
            if getattr(args, name) not in ([], None) and name not in unused
        },
        "data": (
            f"{_TEXTS[args.dataset]} (`--dataset {args.dataset}`); vocabulary "
            f"{trained.vocabulary.fingerprint()}."
        ),
        "use": (
            "import deq_sequence\n\n"
            'model = deq_sequence.load("NAME")\n'
            'print(model.generate("the", words=20, seed=1))'
        ),
        "samples": (
            f"segments of {args.eval_tgt_len} {symbols} of the test text, each with the memory of "
            f"the {symbols} before it"
        ),
        "measures": {"log-likelihood": f"the mean log p of the {symbols}, in nats"},
        "difficulty": f"how rare the {symbols} are",
    }


def _figures(figures: dict[str, dict], characters: bool) -> dict[str, str]:
    """Rows of the card: of the final evaluation, or of the last one in training.

    A figure that is not finite has no row.
    """
    rows = {}
    final = {name: record for name, record in figures.items() if name.startswith("final_")}
    for name, record in (final or figures).items():
        split = name.removeprefix("final_")
        record = finite(record)
        if (loss := record.get("loss")) is not None:
            what = "bits per character" if characters else "perplexity"
            value = loss / math.log(2) if characters else perplexity(loss)
            rows[f"{what} ({split})"] = f"{value:.3f}"
        if record.get("nfe"):
            rows[f"evaluations of f ({split})"] = f"{record['nfe']:.1f}"
        if record.get("nfe") and "rel_residual" in record:
            rows[f"relative residual ({split})"] = f"{record['rel_residual']:.1e}"
    return rows
