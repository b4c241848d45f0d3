"""The cache of an encoded corpus: one file of tensors, strings and numbers in the data folder."""

import contextlib
from pathlib import Path

import torch

from lib.runs.atomic_files import atomic_write

FORMAT_VERSION = 2  # to be raised whenever the same texts get other ids


def cache_path(datadir: Path, dataset: str) -> Path:
    """The path of the cache of ``dataset``; data sets in one folder have separate caches."""
    return Path(datadir) / f"corpus.{dataset}.pt"


def cache_key(dataset: str, rules: tuple, sources: list[Path]) -> list:
    """What a cache depends on: ``rules`` are those by which the symbols of a data set get ids."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    return [FORMAT_VERSION, dataset, rules, files]


def load(path: Path, key: list) -> tuple[list[str], dict[str, torch.Tensor]] | None:
    """The symbols and the ids per split (1-d LongTensors); None without a cache of this ``key``."""
    try:
        stored = torch.load(path, weights_only=True)
        if stored["key"] != key:
            return None
        return stored["idx2sym"], {name: ids.long() for name, ids in stored["ids"].items()}
    except Exception:  # a damaged file can raise anything; the texts are read instead
        return None


def save(path: Path, key: list, idx2sym: list[str], ids: dict[str, torch.Tensor]) -> None:
    """Write the cache atomically; if this is impossible, continue without a cache."""
    stored = {
        "key": key,
        "idx2sym": idx2sym,
        "ids": {name: tensor.int() for name, tensor in ids.items()},  # half the size on disk
    }
    # torch.save turns a full disk into a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError), atomic_write(path) as file:
        torch.save(stored, file)
