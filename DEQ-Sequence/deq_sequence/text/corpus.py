"""Text data sets as token ids: ``get_lm_corpus(datadir, dataset)``."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import torch

from deq_sequence.text import corpus_cache
from deq_sequence.text.demo_corpus import SPLITS, build_demo_corpus
from deq_sequence.text.one_file import split_file
from deq_sequence.text.text_files import read_bytes, read_lines
from deq_sequence.text.vocabulary import UNK, ByteVocab, Vocab
from lib.errors import InputError


@dataclass(frozen=True)
class Dataset:
    """The properties of a data set: how its symbols get ids."""

    counted: tuple[str, ...] = ("train",)  # splits whose symbols form the vocabulary, in order
    lower_case: bool = False
    characters: bool = False  # symbols are bytes; bits per character instead of perplexity
    min_count: int = 1  # of words: those that are counted less often become <unk>
    held_out: float = 0.05  # of one file: the share of valid, and of test


# As in Transformer-XL: the published results use its vocabularies.
DATASETS = {
    "wt103": Dataset(),
    "wt2": Dataset(counted=SPLITS),
    "ptb": Dataset(counted=SPLITS, lower_case=True),
    "enwik8": Dataset(counted=SPLITS, characters=True),
    "text8": Dataset(counted=SPLITS, characters=True),
    "demo": Dataset(),
    "text": Dataset(min_count=2),  # the user's own; the command line has its rules
}
OWN = "text"


@dataclass(eq=False)
class Corpus:
    """A data set as token ids: 1-d LongTensors, in the order of the text."""

    dataset: str  # a key of DATASETS
    vocab: Vocab  # ByteVocab for characters
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    rules: Dataset

    @property
    def description(self) -> str:
        """The sizes, for the log; and the share of <unk>, if rare words became it."""
        text = f"{len(self.train)} training tokens, {len(self.vocab)} types"
        if self.rules.min_count == 1 or self.characters:
            return text
        unknown = (self.valid == self.vocab.sym2idx[UNK]).float().mean().item()
        return f"{text}, {100 * unknown:.1f} % of the validation tokens are {UNK}"

    def fingerprint(self) -> str:
        """A short text that changes if a token of any split changes."""
        digest = hashlib.blake2b(digest_size=6)
        for split in SPLITS:
            tokens = getattr(self, split)
            digest.update(f"{split} {len(tokens)} ".encode())
            digest.update(tokens.numpy())
        return f"{len(self.train)} training tokens ({digest.hexdigest()})"

    @property
    def characters(self) -> bool:
        """Whether symbols are bytes."""
        return self.rules.characters


def get_lm_corpus(datadir: str | Path, dataset: str, rules: Dataset | None = None) -> Corpus:
    """Read ``train.txt``, ``valid.txt`` and ``test.txt`` of a data set.

    The first call saves the ids in a cache file in ``datadir``. Later calls read the cache in
    seconds, as long as the three files do not change. For ``demo`` missing files are made from the
    documentation of the Python installation.

    Args:
        datadir: folder of the three files. They hold UTF-8 text with a sentence or paragraph per
            line; for enwik8 and text8 the bytes themselves. For ``text``, it may be one file,
            which is cut in three.
        dataset: a key of ``DATASETS``.
        rules: how symbols get ids, for ``text``; by default the entry in ``DATASETS``.

    Raises:
        InputError: the data set is unknown; the folder or a file is missing; a file is empty or
            not UTF-8; or a word is not in the vocabulary, which has no ``<unk>``.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    datadir = Path(datadir)
    if dataset == "demo":
        build_demo_corpus(datadir)
    paths = _source_files(datadir, dataset)
    rules = DATASETS[dataset] if rules is None else rules
    sources = list(dict.fromkeys(paths.values()))
    name = f"{dataset}.{datadir.name}" if datadir.is_file() else dataset
    cache = corpus_cache.cache_path(sources[0].parent, name)
    key = corpus_cache.cache_key(dataset, astuple(rules), sources)
    cached = corpus_cache.load(cache, key)
    if cached is None:
        vocab, ids = _encode(dataset, paths, rules)
        corpus_cache.save(cache, key, vocab.idx2sym, ids)
    else:
        idx2sym, ids = cached
        kind = ByteVocab if rules.characters else Vocab
        vocab = kind.from_symbols(idx2sym, lower_case=rules.lower_case)
    return Corpus(dataset, vocab, *(ids[split] for split in SPLITS), rules)


def _source_files(datadir: Path, dataset: str) -> dict[str, Path]:
    way_out = f"fetch it with 'bash get_data.sh {dataset}' in DEQ-Sequence, or try --dataset demo"
    if dataset == OWN:
        way_out = "name a folder with train.txt, valid.txt and test.txt by --data, or one text file"
        if datadir.is_file():
            return dict.fromkeys(SPLITS, datadir)
    if not datadir.is_dir():
        raise InputError(f"data folder {datadir} does not exist: {way_out}")
    paths = {split: datadir / f"{split}.txt" for split in SPLITS}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path} does not exist: {way_out}")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: {way_out}")
    return paths


def _encode(
    dataset: str, paths: dict[str, Path], rules: Dataset
) -> tuple[Vocab, dict[str, torch.Tensor]]:
    """The vocabulary, and per split the token ids."""
    one_file = len(set(paths.values())) == 1
    lines: dict[str, Callable[[], Iterable[str]]]  # per split, what opens its lines
    if one_file:
        parts = split_file(paths["train"], rules.held_out, whole_lines=not rules.characters)
        lines = {split: partial(StringIO, part) for split, part in parts.items()}
    else:
        lines = {split: partial(read_lines, path) for split, path in paths.items()}
    sources = {s: f"{path} ({s})" if one_file else str(path) for s, path in paths.items()}
    if not rules.characters:
        return _encode_words(lines, sources, rules)
    if dataset != OWN:
        return _encode_bytes({s: read_bytes(path) for s, path in paths.items()}, sources, rules)
    texts = {split: "".join(open_lines()) for split, open_lines in lines.items()}
    if rules.lower_case:
        texts = {split: text.lower() for split, text in texts.items()}
    return _encode_bytes({s: text.encode() for s, text in texts.items()}, sources, rules)


def _encode_words(
    lines: dict[str, Callable[[], Iterable[str]]], sources: dict[str, str], rules: Dataset
) -> tuple[Vocab, dict[str, torch.Tensor]]:
    vocab = Vocab(lower_case=rules.lower_case, min_count=rules.min_count)
    for split in rules.counted:
        vocab.count(lines[split]())
    vocab.build()
    return vocab, {s: vocab.encode(lines[s](), source=source) for s, source in sources.items()}


def _encode_bytes(
    raw: dict[str, bytes], sources: dict[str, str], rules: Dataset
) -> tuple[Vocab, dict[str, torch.Tensor]]:
    vocab = ByteVocab(lower_case=rules.lower_case)
    vocab.count(raw[split] for split in rules.counted)
    vocab.build()
    return vocab, {s: vocab.encode([raw[s]], source=source) for s, source in sources.items()}
