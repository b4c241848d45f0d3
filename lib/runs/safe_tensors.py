"""The safetensors format: named tensors without code; our files add a checksum."""

import hashlib
import json
from typing import BinaryIO

import torch
from torch import Tensor

from lib.errors import InputError, needs

with needs("runs"):
    import safetensors.torch

# The key of our checksum in a file's metadata, and the beginning of its value. Either identifies
# the checksum: damage to one of them does not turn our file into a foreign one without a checksum.
_CHECKSUM, _VALUE = "tensors.sha256", "sha256 of the tensors: "


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that begins with ``head`` (9 bytes) has this format.

    It begins with the length of its header (8 bytes, little-endian); the header is a JSON object.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """Read the tensors of a file; for a moment this needs twice the file's size in memory.

    Raises:
        ValueError: the file has a checksum, and the tensors do not match it.
        Exception: any error that safetensors raises for a damaged file.
    """
    data = file.read()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    checksums = {v for k, v in metadata.items() if k == _CHECKSUM or v.startswith(_VALUE)}
    if checksums and checksums != {_checksum(tensors)}:
        raise ValueError("the checksum differs")
    return tensors


def safetensors_bytes(state: dict[str, Tensor]) -> bytes:
    """The content of a file with ``state``; names that share memory (tied weights) get copies.

    Raises:
        InputError: the format does not support a tensor.
    """
    # Contiguous copies, as the format has neither shared memory nor strides.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    try:
        return safetensors.torch.save(tensors, {"format": "pt", _CHECKSUM: _checksum(tensors)})
    except (KeyError, ValueError) as error:
        raise InputError(f"safetensors files cannot hold these tensors: {error}") from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors, which are sorted by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return _VALUE + found.hexdigest()
