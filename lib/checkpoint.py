"""Files of tensors: atomic saving, safe loading, and weights that must match their model."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lib.errors import InputError, naming
from lib.files import atomic_write
from lib.safe_tensors import is_safetensors, read_safetensors

# Prefixes that wrappers leave on the keys of published files.
_WRAPPERS = ("module.", "model.")
_ARCHIVE = b"PK\x03\x04"  # the first bytes of what torch.save writes since version 1.6
_FOLDER = 0x10  # the attribute of an archive's entry that makes it a folder


def save_atomic(obj, path: str | Path, before_rename: Callable[[], None] | None = None) -> None:
    """Write ``obj`` (tensors and plain containers) so that ``path`` is never half a file.

    A kill or a full disk leaves what was there; ``before_rename`` is that of
    :func:`lib.files.atomic_write`.

    Raises:
        OSError: it cannot be written, for want of space or permission.
    """
    with atomic_write(Path(path), before_rename) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # After a failed write torch also fails to end its archive, and reports only that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | Path, map_location: str | torch.device = "cpu"):
    """Read a file of tensors and plain containers; code in it is refused, never run.

    It may be a file of torch.save or of safetensors; what it is, its content tells. Whatever
    differs from what was written is found by the checksums of torch's archives, and by that of
    the safetensors files that :func:`lib.export.export_weights` writes. Files of torch's form
    before version 1.6 and safetensors files of others carry none: damage to their numbers passes.

    Raises:
        InputError: the file is missing, truncated, damaged, not such a file, or holds code.
        PermissionError: it may not be read, which says nothing about its content.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a saved checkpoint or weights file")
    # Opened once, so that what was verified is what is loaded, even if the file is replaced.
    with open(path, "rb") as file:
        try:
            return _read(file, map_location)
        except pickle.UnpicklingError as error:
            if _holds_code(str(error), file):
                raise InputError(
                    f"{path} holds Python objects besides tensors, which could run code: it was "
                    "not loaded; save its state_dict() instead"
                ) from error
            raise InputError(_damaged(path)) from error
        except Exception as error:  # what a damaged file raises in its parser can be anything
            raise InputError(_damaged(path)) from error


def _read(file: BinaryIO, map_location: str | torch.device):
    head, size = file.read(9), os.fstat(file.fileno()).st_size
    file.seek(0)
    if is_safetensors(head, size):
        return {key: value.to(map_location) for key, value in read_safetensors(file).items()}
    archive = head.startswith(_ARCHIVE)
    if archive:
        _verify_archive(file, size)
        file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pickle's protocol, which the error covers
        content = torch.load(file, map_location=map_location, weights_only=True)
    if not archive and file.tell() != size:
        raise ValueError("more bytes than the tensors need")
    return content


def _verify_archive(file: BinaryIO, size: int) -> None:
    """Refuse an archive that is damaged, or that torch would read otherwise than Python does.

    torch does not compare checksums, so a flipped bit in the data would pass. Where the directory
    calls an entry a folder, or too long, torch leaves the memory of a tensor as it was; and of two
    archives in a row Python reads the second, but torch the first.
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
                while content.read(2**20):  # at the end, the checksum is compared
                    pass


def _holds_code(message: str, file: BinaryIO) -> bool:
    """Whether the refusal of torch's unpickler is due to what was pickled, not to damage."""
    file.seek(0)
    head = file.read(2)
    # Plain pickles since protocol 4 begin with an operation that tensor files never have.
    return "GLOBAL" in message or (head[:1] == pickle.PROTO and head[1:] >= b"\x04")


def _damaged(path: Path) -> str:
    return f"{path} is not a readable checkpoint (truncated or damaged): use another copy of it"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict file into ``model``: published weights, or a checkpoint of ours.

    A leading "module." or "model." of wrappers is taken off the keys.

    Raises:
        InputError: unreadable file, keys or shapes that differ (all are listed), NaN or Inf.
    """
    load_state(model, read_state(path), str(path))


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, which may hold it bare or under 'model' or 'state_dict'.

    Raises:
        InputError: an unreadable file, or one without a state dict of ordinary tensors.
    """
    content = load(path)
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{path} holds no state dict: expected a mapping of names to tensors")
    if odd := odd_tensors(content):
        raise InputError(
            f"{path} holds tensors that are sparse, quantised, complex or without data, which no "
            f"model here has: {', '.join(odd)}"
        )
    return content


def odd_tensors(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are no plain arrays of real numbers."""
    return [
        key
        for key, value in state.items()
        if value.layout is not torch.strided
        or value.is_quantized
        or value.is_complex()
        or value.is_meta
    ]


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict by key and shape, or refuse it as a whole with the list of differences.

    A model may name the beginnings of keys that files have too many in ``ignored_state``, a tuple.
    """
    state = strip_wrappers(state, model)
    ignored = getattr(model, "ignored_state", ())
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        raise InputError(f"the weights in {source} do not fit this model: {'; '.join(problems)}")
    if bad := not_finite(state):
        raise InputError(f"the weights in {source} are not finite: {', '.join(bad)}")
    with naming(source):  # what a model of its own refuses
        model.load_state_dict(state)


def strip_wrappers(state: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Take prefixes of wrappers off the keys, unless ``model`` itself has such a module."""
    own = {} if model is None else dict(model.named_children())
    wrappers = [prefix for prefix in _WRAPPERS if prefix[:-1] not in own]
    while state:
        shared = [p for p in wrappers if all(key.startswith(p) for key in state)]
        if not shared:
            break
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    return state


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    return [
        key
        for key, value in state.items()
        if value.is_floating_point() and not value.is_meta and not _is_finite(value)
    ]


def _is_finite(value: Tensor) -> bool:
    # isfinite does not know all floating point numbers of 8 bits.
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())
