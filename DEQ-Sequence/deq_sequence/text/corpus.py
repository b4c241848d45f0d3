"""Text data sets as token ids: ``get_lm_corpus(datadir, dataset)``."""

import hashlib
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from deq_sequence.text import corpus_cache
from deq_sequence.text.demo_corpus import SPLITS, build_demo_corpus
from deq_sequence.text.text_files import read_bytes, read_lines
from deq_sequence.text.vocabulary import ByteVocab, Vocab
from lib.errors import InputError


@dataclass(frozen=True)
class Dataset:
    """The properties of a data set."""

    counted: tuple[str, ...] = ("train",)  # splits whose symbols form the vocabulary, in order
    lower_case: bool = False
    characters: bool = False  # symbols are bytes; bits per character instead of perplexity


# As in Transformer-XL: the published results use its vocabularies.
DATASETS = {
    "wt103": Dataset(),
    "wt2": Dataset(counted=SPLITS),
    "ptb": Dataset(counted=SPLITS, lower_case=True),
    "enwik8": Dataset(counted=SPLITS, characters=True),
    "text8": Dataset(counted=SPLITS, characters=True),
    "demo": Dataset(),
}


@dataclass(eq=False)
class Corpus:
    """A data set as token ids: 1-d LongTensors, in the order of the text."""

    dataset: str  # a key of DATASETS
    vocab: Vocab  # ByteVocab for characters
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor

    @property
    def description(self) -> str:
        """The sizes, for the log."""
        return f"{len(self.train)} training tokens, {len(self.vocab)} types"

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
        return DATASETS[self.dataset].characters


def get_lm_corpus(datadir: str | Path, dataset: str) -> Corpus:
    """Read ``train.txt``, ``valid.txt`` and ``test.txt`` of a data set.

    The first call saves the ids in a cache file in ``datadir``. Later calls read the cache in
    seconds, as long as the three files do not change. For ``demo`` missing files are made from the
    documentation of the Python installation.

    Args:
        datadir: folder of the three files. They hold UTF-8 text with a sentence or paragraph per
            line; for enwik8 and text8 the bytes themselves.
        dataset: a key of ``DATASETS``.

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
    facts = DATASETS[dataset]
    cache = corpus_cache.cache_path(datadir, dataset)
    key = corpus_cache.cache_key(dataset, astuple(facts), list(paths.values()))
    cached = corpus_cache.load(cache, key)
    if cached is None:
        vocab, ids = (_read_bytes if facts.characters else _read_words)(paths, facts)
        corpus_cache.save(cache, key, vocab.idx2sym, ids)
    else:
        idx2sym, ids = cached
        kind = ByteVocab if facts.characters else Vocab
        vocab = kind.from_symbols(idx2sym, lower_case=facts.lower_case)
    return Corpus(dataset, vocab, *(ids[split] for split in SPLITS))


def _source_files(datadir: Path, dataset: str) -> dict[str, Path]:
    way_out = f"fetch it with 'bash get_data.sh {dataset}' in DEQ-Sequence, or try --dataset demo"
    if not datadir.is_dir():
        raise InputError(f"data folder {datadir} does not exist: {way_out}")
    paths = {split: datadir / f"{split}.txt" for split in SPLITS}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path} does not exist: {way_out}")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: {way_out}")
    return paths


def _read_words(paths: dict[str, Path], facts: Dataset) -> tuple[Vocab, dict[str, torch.Tensor]]:
    vocab = Vocab(lower_case=facts.lower_case)
    for split in facts.counted:
        vocab.count(read_lines(paths[split]))
    vocab.build()
    return vocab, {
        split: vocab.encode(read_lines(path), source=str(path)) for split, path in paths.items()
    }


def _read_bytes(paths: dict[str, Path], facts: Dataset) -> tuple[Vocab, dict[str, torch.Tensor]]:
    vocab = ByteVocab()
    raw = {split: read_bytes(path) for split, path in paths.items()}
    vocab.count(raw[split] for split in facts.counted)
    vocab.build()
    return vocab, {
        split: vocab.encode([raw[split]], source=str(path)) for split, path in paths.items()
    }
