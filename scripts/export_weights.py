"""Write the weights of a run, or of a file of weights, as a .safetensors or plain .pt file.

    python scripts/export_weights.py SOURCE TARGET

SOURCE is model.pt or checkpoint.pt of either trainer, a published file, or a .safetensors file.
TARGET ends in .safetensors or .pt. Every command that loads weights reads both formats.
"""

import sys
from pathlib import Path

try:
    import torch
    from torch import Tensor

    from lib.errors import InputError, needs
    from lib.runs.atomic_files import atomic_write
    from lib.runs.checkpoint import (
        CHECKSUM,
        check_target,
        checksum,
        not_finite,
        odd_tensors,
        read_state,
        save_atomic,
    )
    from lib.runs.command_line import Parser, exit_code

    with needs("runs"):
        import safetensors.torch
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("export_weights.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Export the weights that the command line names."""
    parser = Parser(prog="export_weights.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="model.pt, checkpoint.pt or .safetensors")
    parser.add_argument("target", help="file to write: .safetensors, or .pt")
    args = parser.parse_args(argv)
    names = export_file(args.source, args.target)
    print(f"{args.target}: {len(names)} tensors of {args.source}")


def export_weights(state: dict[str, Tensor], path: str | Path) -> None:
    """Write a state dict atomically; the suffix of ``path`` selects the format.

    Files of both formats hold all names. In a .pt file tied weights stay tied. In a .safetensors
    file each name has its own copy, and the metadata holds a checksum that our loader compares.

    Raises:
        InputError: the suffix is unknown, or a tensor is not a plain array of real numbers.
        OSError: the file cannot be written; an old file at ``path`` is unchanged.
    """
    path = Path(path)
    _check_suffix(path)
    if odd := odd_tensors(state):
        raise InputError(f"these tensors are no plain arrays of real numbers: {', '.join(odd)}")
    if path.suffix in TORCH:
        save_atomic(_on_cpu(state), path)
        return
    content = _safetensors_bytes(state)
    with atomic_write(path) as file:
        file.write(content)


def export_file(source: str | Path, target: str | Path) -> list[str]:
    """Write the weights in a file to another one by :func:`export_weights`; return their names.

    The source may be any file of weights or checkpoint; the target's folder is created if absent.

    Raises:
        InputError: the source is unreadable or has no weights, the weights are not finite, the
            target is the source, or its suffix is unknown.
    """
    target = Path(target)
    _check_suffix(target)
    check_target(source, target)
    state = read_state(source)
    if not state:
        raise InputError(f"{source} holds no weights: its state dict is empty")
    if bad := not_finite(state):
        raise InputError(f"the weights in {source} are not finite: {', '.join(bad)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    export_weights(state, target)
    return list(state)


def _safetensors_bytes(state: dict[str, Tensor]) -> bytes:
    """The content of a file; names that share memory (tied weights) get copies."""
    # Contiguous copies, as the format has neither shared memory nor strides.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    try:
        return safetensors.torch.save(tensors, {"format": "pt", CHECKSUM: checksum(tensors)})
    except (KeyError, ValueError) as error:
        raise InputError(f"safetensors files cannot hold these tensors: {error}") from error


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a state dict to the CPU; names with the same tensor get one copy together."""
    copies: dict[tuple, Tensor] = {}

    def place(value: Tensor) -> tuple:
        storage = value.untyped_storage()._cdata
        return storage, value.storage_offset(), value.shape, value.stride(), value.dtype

    return {
        name: copies.setdefault(place(value), value.detach().cpu()) for name, value in state.items()
    }


def _check_suffix(path: Path) -> None:
    if path.suffix not in SAFETENSORS + TORCH:
        known = ", ".join(SAFETENSORS + TORCH)
        raise InputError(f"cannot tell the format of {path}: let its name end in one of {known}")


if __name__ == "__main__":
    sys.exit(main())
