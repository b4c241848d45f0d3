"""Files of tensors: atomic saving, safe loading, and weights that must match their model."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.files import atomic_write

# Prefixes that wrappers leave on the keys of published files.
_WRAPPERS = ("module.", "model.")


def save_atomic(obj, path: str | Path) -> None:
    """Write ``obj`` (tensors and plain containers) so that ``path`` is never half a file.

    A kill or a full disk leaves what was there.
    """
    with atomic_write(Path(path)) as file:
        torch.save(obj, file)


def load(path: str | Path, map_location="cpu"):
    """Read a file of tensors and plain containers; code in it is refused, never run.

    Raises:
        InputError: the file is missing, truncated, damaged, not such a file, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a saved checkpoint or weights file")
    try:
        # torch does not compare the checksums of its archives, so a flipped bit would pass.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise InputError(_damaged(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol, which the error covers
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds Python objects besides tensors, which could run code: it was not "
                "loaded; save its state_dict() instead"
            ) from error
        raise InputError(_damaged(path)) from error
    except (InputError, PermissionError):
        raise
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, zipfile.BadZipFile) as error:
        raise InputError(_damaged(path)) from error


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
    """The state dict in a file, which may hold it bare or under 'model' or 'state_dict'."""
    content = load(path)
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return content


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
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all()
    ]
