"""Weights in a file for others: safetensors, or a plain file of torch.save."""

from pathlib import Path

from torch import Tensor

from lib.checkpoint import not_finite, odd_tensors, read_state, save_atomic
from lib.errors import InputError
from lib.files import atomic_write
from lib.safe_tensors import safetensors_bytes

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth")


def export_weights(state: dict[str, Tensor], path: str | Path) -> None:
    """Write a state dict whole or not at all; the suffix of ``path`` says in which format.

    Both hold every name. Tied weights stay tied in a .pt file; in a .safetensors file each name
    has its copy, and a checksum of all is stored beside them, which our loader compares.

    Raises:
        InputError: another suffix, or tensors that are no plain arrays of real numbers.
        OSError: it cannot be written; what was at ``path`` is untouched.
    """
    path = Path(path)
    _check_suffix(path)
    if odd := odd_tensors(state):
        raise InputError(f"these tensors are no plain arrays of real numbers: {', '.join(odd)}")
    if path.suffix in TORCH:
        save_atomic({name: value.detach().cpu() for name, value in state.items()}, path)
        return
    content = safetensors_bytes(state)
    with atomic_write(path) as file:
        file.write(content)


def export_file(source: str | Path, target: str | Path) -> list[str]:
    """Write the weights of one file to another, as :func:`export_weights` does.

    Args:
        source: model.pt, a checkpoint of either trainer, published weights, or .safetensors.
        target: the file to write; its folder is made.

    Returns:
        The names that were written.

    Raises:
        InputError: an unreadable source, one without weights, weights that are not finite, or a
            target of another suffix.
    """
    target = Path(target)
    _check_suffix(target)
    state = read_state(source)
    if not state:
        raise InputError(f"{source} holds no weights: its state dict is empty")
    if bad := not_finite(state):
        raise InputError(f"the weights in {source} are not finite: {', '.join(bad)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    export_weights(state, target)
    return list(state)


def _check_suffix(path: Path) -> None:
    if path.suffix not in SAFETENSORS + TORCH:
        known = ", ".join(SAFETENSORS + TORCH)
        raise InputError(f"cannot tell the format of {path}: let its name end in one of {known}")
