"""The cache of an encoded corpus: one file of tensors, strings and numbers beside the texts."""

import contextlib
from pathlib import Path

import torch

from lib.files import atomic_write

FORMAT_VERSION = 2  # raise it whenever the ids of the same texts change


def cache_path(datadir: Path, dataset: str) -> Path:
    """Where the cache of ``dataset`` lies; data sets that share a folder do not share it."""
    return Path(datadir) / f"corpus.{dataset}.pt"


def cache_key(dataset: str, rules: tuple, sources: list[Path]) -> list:
    """What a cache depends on: format version, data set, the rules by which its symbols get their
    ids, and each file's name, size and mtime."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    return [FORMAT_VERSION, dataset, rules, files]


def load(path: Path, key: list) -> tuple[list[str], dict[str, torch.Tensor]] | None:
    """The symbols and the ids per split (1-d LongTensors), or None without a valid cache.

    A cache is valid if it can be read and was saved under the same ``key``. It is read with
    ``weights_only``, so a file from elsewhere cannot run code.
    """
    try:
        stored = torch.load(path, weights_only=True)
        if stored["key"] != key:
            return None
        return stored["idx2sym"], {name: ids.long() for name, ids in stored["ids"].items()}
    except Exception:  # a damaged file fails in any way it likes, and the texts are still there
        return None


def save(path: Path, key: list, idx2sym: list[str], ids: dict[str, torch.Tensor]) -> None:
    """Write the cache, whole or not at all; where that is impossible, do without one."""
    stored = {
        "key": key,
        "idx2sym": idx2sym,
        "ids": {name: tensor.int() for name, tensor in ids.items()},  # half the size on disk
    }
    # torch.save turns a full disk into a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError), atomic_write(path) as file:
        torch.save(stored, file)
