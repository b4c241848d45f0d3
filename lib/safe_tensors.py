"""The safetensors format: tensors by name, without any code, and here with a checksum."""

import hashlib
import json
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from lib.errors import InputError

# Our checksum in a file's metadata: its name, and what its value begins with, so that damage to
# one of the two does not make it the file of another, without a checksum.
_CHECKSUM, _VALUE = "tensors.sha256", "sha256 of the tensors: "


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that begins with ``head`` (9 bytes) has this format.

    It begins with the length of its header, which is a JSON object.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a file; it is in memory twice for a moment.

    Raises:
        ValueError: they are not those that the checksum in it was taken of.
        Exception: whatever safetensors raises for a damaged file.
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
    """The file that holds ``state``; names that share memory (tied weights) get copies each.

    Raises:
        InputError: a kind of tensor that the format does not have.
    """
    # Copies, as the format knows neither shared memory nor strides.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    try:
        return safetensors.torch.save(tensors, {"format": "pt", _CHECKSUM: _checksum(tensors)})
    except (KeyError, ValueError) as error:
        raise InputError(f"safetensors files cannot hold these tensors: {error}") from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return _VALUE + found.hexdigest()
