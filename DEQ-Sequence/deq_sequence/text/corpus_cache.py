"""The cache of an encoded corpus: one file of tensors, strings and numbers in the data folder."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.runs import checkpoint
from lib.runs.atomic_files import atomic_write

FORMAT_VERSION = 3  # to be raised whenever the same texts get other ids


def cache_path(datadir: Path, dataset: str) -> Path:
    """The path of the cache of ``dataset``; data sets in one folder have separate caches."""
    return Path(datadir) / f"corpus.{dataset}.pt"


def cache_key(dataset: str, rules: tuple, sources: list[Path]) -> list:
    """What a cache depends on: the content of the files ``sources``, and the ``rules`` by which
    the symbols of a data set get ids.

    Sizes and times of files would not do: a copy can keep both, and a time may be coarse. SHA-256
    of WikiText-103 takes about half a second.
    """
    return [FORMAT_VERSION, dataset, rules, [[path.name, _digest(path)] for path in sources]]


def load(path: Path, key: list) -> tuple[list[str], dict[str, Tensor]] | None:
    """The symbols and the ids per split (1-d LongTensors); None without a cache of this ``key``.

    A file with a wrong checksum is no error: a line on the error stream names it, and the texts
    are read instead.
    """
    if not path.is_file():
        return None
    try:
        stored = checkpoint.load(path)
        if stored["key"] != key:
            return None
        idx2sym, ids = stored["idx2sym"], stored["ids"]
        if stored["sha256"] != _checksum(idx2sym, ids):
            raise ValueError("the checksum differs")
    except Exception as error:  # a damaged file can raise anything
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        print(f"{path}: {reason}; the texts are encoded again", file=sys.stderr)
        return None
    return idx2sym, {name: tensor.long() for name, tensor in ids.items()}


def save(path: Path, key: list, idx2sym: list[str], ids: dict[str, Tensor]) -> None:
    """Write the cache atomically; if this is impossible, continue without a cache."""
    ids = {name: tensor.int() for name, tensor in ids.items()}  # half the size on disk
    stored = {"key": key, "idx2sym": idx2sym, "ids": ids, "sha256": _checksum(idx2sym, ids)}
    # torch.save turns a full disk into a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError), atomic_write(path) as file:
        torch.save(stored, file)


def _checksum(idx2sym: list[str], ids: dict[str, Tensor]) -> str:
    """SHA-256 of the symbols, and of the names, dtypes, shapes and bytes of the tensors."""
    arrays = {name: tensor.numpy() for name, tensor in ids.items()}
    forms = [[name, str(array.dtype), array.shape] for name, array in arrays.items()]
    found = hashlib.sha256(json.dumps([idx2sym, forms]).encode())
    for array in arrays.values():
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
