"""The card of an exported model: a page that says what it is, what it reaches, how to use it.

The package of the model gives the facts (its ``trained.facts``), a dict of

    title       a heading
    about       what the model is, in a sentence or two
    equation    of its equilibrium, in a line
    parameters  how many there are
    figures     name and text of each figure, of the run's last or best evaluation
    settings    name and value of each setting that shaped it, and the seed
    data        what it was trained on, in a sentence
    use         lines of Python that load and use the file NAME, with picture.png if with a picture
    picture     one that fits, from the repository's root; may be absent
    samples     what the samples of an audit are
    measures    what each measure of an audit is
    difficulty  what it takes for the difficulty of a sample
"""

import json
import platform
from pathlib import Path

import torch

from lib.auditing.findings import OWN
from lib.errors import InputError

MARK = "Model card, written by `scripts/export_weights.py`."
# What the content of a file that is no audit can raise.
_OF_CONTENT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)
AUDIT, PICTURE = "audit.json", "picture.png"
_ROOT = Path(__file__).resolve().parents[1]
_VERDICTS = {  # of lib.auditing.findings.judge
    "equilibrium": "The solves settle at a fixed point, and other starts lead to the same one.",
    "unstable equilibrium": "The solver holds a fixed point that plain iteration of f leaves.",
    "local equilibrium": "The solves settle at a fixed point, but not from every other start.",
    "several fixed points": "Other starts lead to other fixed points.",
    "cut short": "The solve stops before it has settled at its fixed point.",
    "no fixed point": "The states do not settle, although the answers stay the same.",
    "truncated iteration": "The answers depend on where the solve ends.",
    "idle solver": "The answers are as good without the solve.",
    "undecided": "The samples are too few to tell.",
}


def card(facts: dict, target: Path, folder: Path) -> str:
    """The card of the model in the file ``target``, exported from the run in ``folder``."""
    rows = {"parameters": f"{facts['parameters']:,}", **facts["figures"]}
    settings = {key: f"`{value}`" for key, value in facts["settings"].items()}
    parts = [
        f"# {facts['title']}",
        f"{MARK} {facts['about']}",
        f"Equilibrium: {facts['equation']}",
        _table("figure", rows),
        "The figures are those of one run, with one seed.",
        f"Trained on: {facts['data']}",
        "## Use",
        *_use(facts, target),
        "## Is it an equilibrium?",
        _audit(folder / AUDIT, facts),
        "## Settings",
        _table("setting", settings),
        f"Exported with Python {platform.python_version()} and PyTorch {torch.__version__}. "
        "The file holds numbers and text, no code. Licence of the code: MIT.",
    ]
    return "\n\n".join(parts) + "\n"


def _use(facts: dict, target: Path) -> list[str]:
    """Lines that can be pasted where the export was called, and a sentence that says where.

    An absolute path is cut to its name, as a card is passed on to others.
    """
    name = target.name if target.is_absolute() else target.as_posix()
    lines, where = facts["use"].replace("NAME", name), "the folder where it was exported"
    if Path.cwd() == _ROOT:
        lines = lines.replace(PICTURE, facts.get("picture", PICTURE))
        where = "the repository's root"
    return [f"Paths are those from {where}:", f"```python\n{lines}\n```"]


def check_card(path: Path) -> None:
    """Refuse to write a card over another page."""
    if path.exists() and not (path.is_file() and MARK in path.read_text("utf-8", "replace")):
        raise InputError(f"the card's file {path} exists and is no card: give another target")


def _audit(path: Path, facts: dict) -> str:
    """What the run's audit found: the verdict in a sentence, a table of solves, a list."""
    if not path.is_file():
        return "The run has no audit (`scripts/audit.py RUN_FOLDER` makes one)."
    try:
        return "\n\n".join(_findings(json.loads(path.read_text("utf-8")), facts))
    except _OF_CONTENT as error:
        raise InputError(f"{path} is no audit: make it again, or delete it") from error


def _findings(found: dict, facts: dict) -> list[str]:
    """The parts of the page, from the content of audit.json (:class:`lib.auditing.Audit`)."""
    measure, cuts, radius, starts = (found[key] for key in ("measure", "cuts", "radius", "starts"))
    own, last = next(cut for cut in cuts if cut["name"] == OWN), cuts[-1]
    elsewhere = sum(start["elsewhere"] for start in starts) / len(starts)
    back = sum(start["settled"] for start in starts) / len(starts) - elsewhere
    spectral = "no sample settled" if not radius["samples"] else (
        "mean {mean:.3f}, largest {largest:.3f}, below 1 for {below_one:.0%} of the samples that "
        "settled. Below 1, plain iteration of f stays at the fixed point"
    ).format(**radius)  # fmt: skip
    rows = [
        f"| {_ending(cut['name'])} | {cut['evaluations']:.1f} | {cut['measure']:.3f} "
        f"| {cut['residual']:.1e} |"
        for cut in cuts
    ]
    return [
        f"**Verdict: {found['verdict']}.** {_VERDICTS[found['verdict']]} In use, a solve takes "
        f"{own['evaluations']:.1f} evaluations of f, and its residual is {own['residual']:.1e}. "
        f"With {last['evaluations']:.1f} evaluations, the {measure} changes by "
        f"{round(last['measure'] - own['measure'], 3) + 0.0:+.3f}.",  # not -0.000
        f"`scripts/audit.py` tried {found['samples']} samples: {facts['samples']}. It ended their "
        "solves earlier and later than in use:",
        "\n".join([f"| the solve | evaluations of f | {measure} | residual |",
                   "|---|---:|---:|---:|", *rows]),
        "\n".join([
            f"- {measure}: {facts['measures'][measure]}; higher is better",
            "- residual: ‖f(z) - z‖ / ‖f(z)‖, over all samples together",
            f"- in use, a solve ends when it meets its tolerance ({found['eps']:g}), and at the "
            f"latest after {found['threshold']} iterations (the threshold)",
            f"- other starts: {back:.0%} of the solves come back to the same point, "
            f"{elsewhere:.0%} settle elsewhere",
            f"- spectral radius of df/dz at the fixed point: {spectral}",
            f"- residual and {measure}: {found['correctness']['said']}",
            f"- evaluations and difficulty ({facts['difficulty']}): {found['effort']['said']}",
        ]),
    ]  # fmt: skip


def _ending(cut: str) -> str:
    """What one cut of an audit does to the solve."""
    if cut == OWN:
        return "as in use"
    if cut.endswith("threshold"):
        return f"goes on, to {cut}"
    return f"ends after {cut}" if cut.isdecimal() else "is skipped: its start is the state"


def _table(head: str, rows: dict[str, str]) -> str:
    return "\n".join(
        [f"| {head} | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    )
