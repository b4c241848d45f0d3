"""The card of an exported model: a page that says what it is, what it reaches, how to use it.

The package of the model gives the facts (its ``trained.facts``), a dict of

    title       a heading
    about       what the model is, in a sentence or two
    equation    of its equilibrium, in a line
    parameters  how many there are
    figures     name and text of each figure, of the run's last or best evaluation
    settings    name and value of each setting that shaped it, and the seed
    data        what it was trained on, in a sentence
    use         lines of Python that load and use a file named NAME
"""

import json
import platform
from pathlib import Path

import torch

from lib.errors import InputError

MARK = "Model card, written by `scripts/export_weights.py`."
AUDIT = "audit.json"


def card(facts: dict, name: str, folder: Path) -> str:
    """The card of the model ``name``, exported from the run in ``folder``."""
    rows = {"parameters": f"{facts['parameters']:,}", **facts["figures"]}
    settings = {key: f"`{value}`" for key, value in facts["settings"].items()}
    parts = [
        f"# {facts['title']}",
        f"{MARK} {facts['about']}",
        f"Equilibrium: {facts['equation']}",
        _table("figure", rows),
        f"Trained on: {facts['data']}",
        "## Use",
        f"```python\n{facts['use'].replace('NAME', name)}\n```",
        "## Is it an equilibrium?",
        _audit(folder / AUDIT),
        "## Settings",
        _table("setting", settings),
        f"Exported with Python {platform.python_version()} and PyTorch {torch.__version__}. "
        "The file holds numbers and text, no code. Licence of the code: MIT.",
    ]
    return "\n\n".join(parts) + "\n"


def check_card(path: Path) -> None:
    """Refuse to write a card over another page."""
    if path.exists() and not (path.is_file() and MARK in path.read_text("utf-8", "replace")):
        raise InputError(f"the card's file {path} exists and is no card: give another target")


def _audit(path: Path) -> str:
    """What the run's audit found, in a list."""
    if not path.is_file():
        return "The run has no audit (`scripts/audit.py RUN_FOLDER` makes one)."
    try:
        found = json.loads(path.read_text("utf-8"))
        cuts = [
            f"solve ({cut['name']}): {cut['evaluations']:.1f} evaluations, {found['measure']} "
            f"{cut['measure']:.3f}, residual {cut['residual']:.1e}"
            for cut in found["cuts"]
        ]
        radius = found["radius"]
        spectral = "no sample settled" if not radius["samples"] else (
            f"mean {radius['mean']:.3f}, largest {radius['largest']:.3f}"
        )  # fmt: skip
        lines = [
            f"verdict of the audit: {found['verdict']} ({found['reason']})",
            *cuts,
            f"residual and correctness: {found['correctness']['said']}",
            f"evaluations and difficulty: {found['effort']['said']}",
            f"spectral radius of df/dz: {spectral}",
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no audit: make it again, or delete it") from error
    return "\n".join(f"- {line}" for line in lines)


def _table(head: str, rows: dict[str, str]) -> str:
    return "\n".join(
        [f"| {head} | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    )
