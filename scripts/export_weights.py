"""Export a trained model with its card, or convert a file of weights.

    python scripts/export_weights.py RUN_FOLDER MODEL.safetensors
    python scripts/export_weights.py WEIGHTS TARGET

Of a run's folder, MODEL.safetensors gets all that is needed to use the model: the best weights, the
settings, the words or classes, the figures. MODEL.md, its card, says what it is.

WEIGHTS is model.pt or checkpoint.pt of either trainer, a published file, or a .safetensors file.
TARGET ends in .safetensors or .pt, and gets the weights alone. Every command that loads weights
reads both formats.
"""

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

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
    from lib.runs.model_file import FORM, KEY, SUM, ModelFile, digest, read_model_file
    from lib.runs.run_folder import SETTINGS
    from model_card import card, check_card

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
    parser.add_argument("source", help="a run's folder; or model.pt, checkpoint.pt, .safetensors")
    parser.add_argument("target", help="file to write: .safetensors; or .pt, of weights alone")
    args = parser.parse_args(argv)
    of_run = Path(args.source).is_dir()
    names = (export_run if of_run else export_file)(args.source, args.target)
    print(f"{args.target}: {len(names)} tensors of {args.source}")
    if of_run:
        print(f"{_card_of(args.target)}: its card")


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
    _check_finite(state, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    export_weights(state, target)
    return list(state)


def export_run(folder: str | Path, target: str | Path) -> list[str]:
    """Write the model of a run as one .safetensors file, and its card beside it.

    Both are written, or none. The names of the tensors are returned.

    Raises:
        InputError: the folder holds no run with weights, or they are not finite; the target does
            not end in .safetensors; or the card would replace a page that is no card.
    """
    folder, target = Path(folder), Path(target)
    if target.suffix not in SAFETENSORS:
        raise InputError(f"a run is exported to a .safetensors file, not to {target}")
    package = _package(folder)
    found = read_model_file(folder, "", package.of_run)
    _check_finite(found.state, folder)
    page = _card_of(target)
    check_card(page)
    if target.is_dir():
        raise InputError(f"{target} is a folder: give another target")
    text = card(package.facts(found), target.name, folder).encode()
    content = _safetensors_bytes(found.state, _about(found) | _tied(found.state))
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as both:  # the renames come last
        for path, data in ((target, content), (page, text)):
            both.enter_context(atomic_write(path)).write(data)
    return list(found.state)


def _card_of(target: str | Path) -> Path:
    return Path(target).with_suffix(".md")


def _package(folder: Path) -> ModuleType:
    """The module of the run's kind; its package is imported only now."""
    if (folder / SETTINGS).is_file():
        with needs("words"):
            from deq_sequence import trained

            return trained
    if (folder / "config.yaml").is_file():
        with needs("images"):
            from mdeq_vision import trained

            return trained
    raise InputError(
        f"{folder} holds no run: expected a folder with settings.json or config.yaml, as training "
        "leaves it"
    )


def _check_finite(state: dict[str, Tensor], source: str | Path) -> None:
    if not state:
        raise InputError(f"{source} holds no weights: its state dict is empty")
    if bad := not_finite(state):
        raise InputError(f"the weights in {source} are not finite: {', '.join(bad)}")


def _safetensors_bytes(state: dict[str, Tensor], more: dict[str, str] | None = None) -> bytes:
    """The content of a file with the metadata ``more``.

    Names that share memory (tied weights) get copies, but for those that ``more`` has as keys: each
    stands for the tensor named by its value.
    """
    more = more or {}
    # Contiguous copies, as the format has neither shared memory nor strides.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    own = {"format": "pt", CHECKSUM: checksum(tensors)}
    stored = {name: value for name, value in tensors.items() if name not in more}
    try:
        return _in_order(safetensors.torch.save(stored, own | more))
    except (KeyError, ValueError) as error:
        raise InputError(f"safetensors files cannot hold these tensors: {error}") from error


def _in_order(content: bytes) -> bytes:
    """The same file with the metadata in a fixed order, so that equal models are equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the format aligns its tensors
    return len(text).to_bytes(8, "little") + text + content[end:]


def _about(found: ModelFile) -> dict[str, str]:
    """What a model file holds beside the tensors: all the rest of a model, with a checksum."""
    figures = {
        # JSON has neither NaN nor infinity.
        kind: {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        for kind, record in found.figures.items()
    }
    said = {
        "form": FORM,
        "kind": found.kind,
        "settings": found.settings,
        "names": found.names,
        "figures": figures,
    }
    return {KEY: json.dumps(said | {SUM: digest(said)}, allow_nan=False)}


def _tied(state: dict[str, Tensor]) -> dict[str, str]:
    """Names whose tensor has an earlier name, with that name."""
    first: dict[tuple, str] = {}
    pairs = {name: first.setdefault(_place(value), name) for name, value in state.items()}
    return {name: other for name, other in pairs.items() if name != other}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a state dict to the CPU; names with the same tensor get one copy together."""
    copies: dict[tuple, Tensor] = {}
    return {
        name: copies.setdefault(_place(value), value.detach().cpu())
        for name, value in state.items()
    }


def _place(value: Tensor) -> tuple:
    """What two names have in common if they are of the same tensor."""
    storage = value.untyped_storage()._cdata
    return storage, value.storage_offset(), value.shape, value.stride(), value.dtype


def _check_suffix(path: Path) -> None:
    if path.suffix not in SAFETENSORS + TORCH:
        known = ", ".join(SAFETENSORS + TORCH)
        raise InputError(f"cannot tell the format of {path}: let its name end in one of {known}")


if __name__ == "__main__":
    sys.exit(main())
