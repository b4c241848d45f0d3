"""A trained model: a run's folder, or one file of export_weights.py."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.errors import InputError, needs
from lib.runs.checkpoint import read_state
from lib.runs.run_folder import WEIGHTS, read_metrics

with needs("runs"):
    from safetensors import safe_open

KEY, SUM, FORM = "deq.model", "sha256", 1
THREADS = (  # for --help
    "CPU threads: 1 for a model of fewer than 10 million parameters, else PyTorch's choice; "
    "OMP_NUM_THREADS overrules"
)
_TYPES = {"kind": str, "settings": dict, "names": list, "figures": dict}


@dataclass(frozen=True)
class ModelFile:
    kind: str
    settings: dict  # of its run
    names: list[str]  # words or classes, by id
    figures: dict[str, dict]  # the run's last records of validation and final tests, by kind
    state: dict[str, Tensor]
    path: Path


def read_model_file(
    path: str | Path, kind: str, of_run: Callable[[Path], tuple[str, dict, list[str]]]
) -> ModelFile:
    """The model in a run's folder, or in a file.

    ``of_run`` returns kind, settings and names of a run.

    Raises:
        InputError: there is no model, or it is damaged or not of ``kind`` ("": any).
    """
    path = Path(path)
    if path.is_dir():
        last = {record.pop("kind"): record for record in read_metrics(path)}
        figures = {k: v for k, v in last.items() if k == "valid" or k.startswith("final_")}
        found = ModelFile(*of_run(path), figures, read_state(path / WEIGHTS), path)
    else:
        state = read_state(path)
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()[KEY])
            whole = said.pop(SUM) == digest(said) and said.pop("form") == FORM
            "".join(said["names"]).encode()  # are texts
            if not whole or {k: type(v) for k, v in said.items()} != _TYPES:
                raise ValueError
            found = ModelFile(**said, state=state, path=path)
        except Exception as error:
            raise InputError(
                f"{path} does not say what model it holds, or is damaged: give a run's folder, or "
                "what scripts/export_weights.py makes of one"
            ) from error
    if kind and found.kind != kind:
        raise InputError(f"{path} is for {found.kind}, not for {kind}: give another model")
    return found


def find_device(name: str | torch.device) -> torch.device:
    """The device of this name, or an InputError."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # not of "meta"
    except Exception as error:
        reason = str(error).split(". ")[0]
        raise InputError(f"the device {name!s} cannot be used here ({reason}): try cpu") from error
    return device


def use_few_threads(model: nn.Module) -> None:
    """One CPU thread if the model is small (``THREADS``): its operations are too short to share."""
    small = sum(p.numel() for p in model.parameters()) < 10_000_000
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def digest(said: dict) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
