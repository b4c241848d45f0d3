"""Checkpoints: atomic saving, safe loading, and checks that their content fits model and run."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from lib.errors import InputError, naming, needs
from lib.runs.atomic_files import atomic_write

with needs("runs"):
    import safetensors.torch

# Key prefixes in published files, left by wrappers such as DataParallel.
_WRAPPERS = ("module.", "model.")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_ARCHIVE = b"PK\x03\x04"  # the first bytes of a torch.save file since version 1.6 (a zip archive)
_REFUSED = "GLOBAL"  # in torch's message on a Python object
_NUMBERS = {f"{o}{c}" for o in "<>=|" for c in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()}
_FOLDER = 0x10  # the attribute that marks an archive entry as a folder
# Key and first words of our checksum in safetensors metadata. Either identifies it: damage to one
# does not turn our file into a foreign one without a checksum.
CHECKSUM, _VALUE = "tensors.sha256", "sha256 of the tensors: "
_MOST = 2**53  # above it, floats do not count in steps of one


def save_atomic(obj, path: str | Path, before_rename: Callable[[], None] | None = None) -> None:
    """Write tensors and plain containers by :func:`lib.runs.atomic_files.atomic_write`.

    Raises:
        OSError: as there.
    """
    with atomic_write(Path(path), before_rename) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # After a failed write torch fails to close its archive, and reports only that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | Path):
    """Read tensors and plain containers to the CPU. A file with code is refused, never run.

    The format is that of torch.save or safetensors, recognised by the content. Checksums reveal
    any damage to torch archives and to safetensors files of scripts/export_weights.py. Files of
    torch before version 1.6, and safetensors files of other programs, have none: damage to their
    numbers goes unnoticed.

    Raises:
        InputError: the file is missing, truncated, damaged, of another format, or holds code.
        PermissionError: the file may not be read; its content may be good.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a saved checkpoint or weights file")
    # Opened once: the bytes verified are those loaded, even if the file is replaced.
    with open(path, "rb") as file:
        try:
            return _read(file)
        except Exception as error:  # on a damaged file a parser can raise anything
            if isinstance(error, pickle.UnpicklingError) and _holds_code(str(error), file):
                raise InputError(
                    f"{path} holds Python objects besides tensors, which could run code: it was "
                    "not loaded; save its state_dict() instead"
                ) from error
            raise InputError(
                f"{path} is not a readable checkpoint (truncated or damaged): use another copy of "
                "it"
            ) from error


def _read(file: BinaryIO):
    head, size = file.read(9), os.fstat(file.fileno()).st_size
    file.seek(0)
    # safetensors: the length of the header (8 bytes, little-endian), then it, a JSON object.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(file)
    archive = head.startswith(_ARCHIVE)
    if archive:
        _verify_archive(file, size)
        file.seek(0)
    with warnings.catch_warnings(), _numpy_numbers():
        warnings.simplefilter("ignore")  # on the pickle protocol: the error says enough
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not archive and file.tell() != size:
        raise ValueError("more bytes than the tensors need")
    return content


class _DType:
    """Stands for numpy.dtype, which could crash with the state that it takes from a file."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(dtype: _DType, data: bytes):
    if f"{dtype.order}{dtype.code}" not in _NUMBERS:
        raise pickle.UnpicklingError(_REFUSED)
    return np.frombuffer(data, dtype.order + dtype.code).item()


def _numpy_numbers():
    """A context in which torch.load (from 2.6) reads NumPy's numbers, such as a best score."""
    if torch.__version__ < "2.6":
        return contextlib.nullcontext()
    names = [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals([(_DType, "numpy.dtype"), *names])


def _verify_archive(file: BinaryIO, size: int) -> None:
    """Refuse an archive that is damaged, or that torch and Python would read differently.

    torch does not compare checksums, so it accepts a flipped bit in the data. It leaves a tensor's
    memory uninitialised if the directory marks the entry as a folder, or gives it too large a size.
    Of two concatenated archives Python reads the second, torch the first.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.compress_size != entry.file_size
                or entry.external_attr & _FOLDER
            ):
                raise zipfile.BadZipFile(f"{entry.filename} is not as torch writes it")
        if not entries or min(entry.header_offset for entry in entries) != 0:
            raise zipfile.BadZipFile("something stands before the archive")
        if len({entry.filename for entry in entries}) < len(entries):
            raise zipfile.BadZipFile("two entries of one name")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("entries that overlap")
        for entry in entries:
            with archive.open(entry) as content:
                while content.read(2**20):  # zipfile compares the checksum at the end
                    pass


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """For a moment this needs twice the file's size in memory."""
    data = file.read()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    # A tied tensor is stored once: the metadata holds its other name, as safetensors writes it.
    tensors |= {k: tensors[v] for k, v in metadata.items() if v in tensors and k not in tensors}
    checksums = {v for k, v in metadata.items() if k == CHECKSUM or v.startswith(_VALUE)}
    if checksums and checksums != {checksum(tensors)}:
        raise ValueError("the checksum differs")
    return tensors


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors, sorted by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return _VALUE + found.hexdigest()


def _holds_code(message: str, file: BinaryIO) -> bool:
    """Whether torch refused the file for its Python objects, not for damage."""
    file.seek(0)
    head = file.read(2)
    # A plain pickle of protocol 4 or later begins with an opcode that tensor files never have.
    return _REFUSED in message or (head[:1] == pickle.PROTO and head[1:] >= b"\x04")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the state dict in a file: see :func:`read_state` and :func:`load_state`."""
    load_state(model, read_state(path), str(path))


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file: the whole content or its entry 'model' or 'state_dict'.

    Raises:
        InputError: the file is unreadable, or holds no state dict of ordinary tensors.
    """
    content = load(path)
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    check_tensors(content, path)
    return content


def check_tensors(content, source: str | Path) -> None:
    """Raise an InputError unless ``content`` is a dict of names and ordinary tensors."""
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{source} holds no state dict: expected a mapping of names to tensors")
    if odd := odd_tensors(content):
        raise InputError(
            f"{source} holds tensors that are sparse, quantised, complex or without data, which no "
            f"model here has: {', '.join(odd)}"
        )


def check_target(source: str | Path, target: str | Path) -> None:
    """Refuse to write over the file ``source``, also by another name."""
    if Path(source).exists() and Path(target).exists() and os.path.samefile(source, target):
        raise InputError(f"{target} is the file that is read: give another name for the output")


def odd_tensors(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are sparse, quantised, complex or meta."""
    return [
        key
        for key, v in state.items()
        if v.layout is not torch.strided or v.is_quantized or v.is_complex() or v.is_meta
    ]


def load_state(
    model: nn.Module, state: dict[str, Tensor], source: str, *, same_dtypes: bool = False
) -> None:
    """Load a state dict whose keys and shapes (``same_dtypes``: and dtypes) are the model's.

    Wrappers' prefixes are removed (:func:`strip_wrappers`), and entries with a prefix in the
    model's ``ignored_state`` (a tuple) ignored.

    Raises:
        InputError: something differs (the message lists all), or a tensor holds NaN or Inf. The
            model is then unchanged.
    """
    state = strip_wrappers(state, model)
    ignored = getattr(model, "ignored_state", ())
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    both = [(key, state[key], own) for key, own in expected.items() if key in state]
    problems += [
        f"{key} has shape {tuple(found.shape)} instead of {tuple(own.shape)}"
        for key, found, own in both
        if found.shape != own.shape
    ]
    problems += [
        f"{key} has dtype {found.dtype} instead of {own.dtype}"
        for key, found, own in both
        if same_dtypes and found.dtype != own.dtype
    ]
    if problems:
        raise InputError(f"the weights in {source} do not fit this model: {'; '.join(problems)}")
    if bad := not_finite(state):
        raise InputError(f"the weights in {source} are not finite: {', '.join(bad)}")
    with naming(source):  # a model's own load_state_dict may raise an InputError
        model.load_state_dict(state)


def strip_wrappers(state: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Remove "module." and "model." if all keys share them and ``model`` has no child of that name.

    The "_orig_mod." of torch.compile is removed wherever it stands, as any part may be compiled.
    """
    if model is None or not any(_COMPILED.search(key) for key in model.state_dict()):
        plain = {_COMPILED.sub("", key): value for key, value in state.items()}
        state = plain if len(plain) == len(state) else state  # no two may become one
    own = {} if model is None else dict(model.named_children())
    wrappers = [prefix for prefix in _WRAPPERS if prefix[:-1] not in own]
    while state and (shared := [p for p in wrappers if all(key.startswith(p) for key in state)]):
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    return state


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    checked = {k: v for k, v in state.items() if v.is_floating_point() and not v.is_meta}
    return [
        key
        for key, v in checked.items()
        # torch.isfinite does not support all 8-bit floating-point dtypes.
        if not torch.isfinite(v.float() if v.element_size() == 1 else v).all()
    ]


def check_form(found, own, name: str) -> None:
    """Raise an InputError that begins with ``name``, unless ``found`` has the form of ``own``.

    An undamaged file can hold wrong content: with it a fused optimiser writes outside its memory.
    Of one form, and so for all entries, are:

    - a tensor: the same shape and dtype, stored as an array, without NaN;
    - a dict: the same keys; a list or tuple: the same length;
    - an integer: an integer of at least 0; a float: a number;
    - ``...``: anything; else, such as a text: the same type.
    """
    match own:
        case EllipsisType():
            fits = True
        case Tensor():
            fits = isinstance(found, Tensor) and not found.is_meta
            fits = fits and _of_tensor(found) == _of_tensor(own)
        case dict():
            fits = isinstance(found, dict) and found.keys() == own.keys()
        case list() | tuple():
            fits = isinstance(found, (list, tuple)) and len(found) == len(own)
        case int() if not isinstance(own, bool):
            fits = type(found) is int and 0 <= found <= _MOST
        case float():
            fits = type(found) is float or (type(found) is int and abs(found) <= _MOST)
        case _:
            fits = type(found) is type(own)
    if not fits:
        raise InputError(
            f"{name} is {_words(found)}, and this run has {_words(own)}: use another checkpoint"
        )
    if isinstance(own, Tensor) and found.isnan().any():
        raise InputError(f"{name} holds NaN: use another checkpoint")
    if isinstance(own, (dict, list, tuple)):
        for key in own if isinstance(own, dict) else range(len(own)):
            check_form(found[key], own[key], f"{name}[{key!r}]")


def check_plain(found, name: str) -> None:
    """Refuse anything else than a dict of texts, numbers and None."""
    for value in found.values() if isinstance(found, dict) else [()]:
        number = isinstance(value, (int, float)) and not abs(value) >= 2**64
        if not (number or value is None or isinstance(value, str)):
            raise InputError(f"{name} holds {_words(value)}: use another checkpoint")


def _of_tensor(value: Tensor) -> tuple:
    plain = value.layout is torch.strided and not value.is_quantized
    return tuple(value.shape), value.dtype, plain


def _words(value) -> str:
    if isinstance(value, Tensor):
        shape, dtype, plain = _of_tensor(value)
        return f"a tensor {shape} of {dtype}{'' if plain else ' that is no plain array'}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)} entries"
    if type(value) is int and not 0 <= value <= _MOST:
        return "a number out of range"
    return f"of type {type(value).__name__}"
