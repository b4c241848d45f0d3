"""The notebooks run, what they print is what is committed, and a reader can follow without running.

Executing a notebook takes 10 to 40 CPU seconds, so by default one of them is executed.
"""

import base64
import copy
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

import execute_notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
NAMES = ["images", "solvers", "tutorial", "words"]
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")
TINY = 1e-6  # numbers below it are rounding errors or at the tolerance of a solve
CLOSE = 0.1  # relative: other processors round otherwise, and training makes it larger
COUNTS = 2  # evaluations may differ by this many


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def pictures(cell):
    return [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


def differences(committed, fresh):
    """Lines that say where the outputs of two notebooks differ by more than rounding."""
    found = []
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if len(pictures(old)) != len(pictures(new)):
            found.append(f"{old.id}: {len(pictures(old))} pictures are now {len(pictures(new))}")
        # Spaces align columns: their number depends on the width of the numbers.
        texts = [" ".join(printed(cell).split()) for cell in (old, new)]
        if NUMBER.sub("0", texts[0]) != NUMBER.sub("0", texts[1]):
            found.append(f"{old.id}: {texts[0]!r} is now {texts[1]!r}")
        elif "varies" not in old.metadata.get("tags", []):
            pairs = zip(*(NUMBER.findall(text) for text in texts), strict=True)
            found += [f"{old.id}: {a} is now {b}" for a, b in pairs if not agree(a, b)]
    return found


def agree(old, new):
    a, b = (float(text.replace(",", "")) for text in (old, new))
    if old.lstrip("+-").isdigit() and new.lstrip("+-").isdigit():
        return abs(a - b) <= max(COUNTS, CLOSE * abs(a))
    if "e" in old or "e" in new:  # a residual: its size counts
        return max(abs(a), abs(b)) < TINY or 1 / 3 < abs(a / b) < 3
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=0.02)


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize(
    "name", [n if n == "solvers" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_outputs_are_those_of_the_code(name):
    path = ROOT / f"docs/notebooks/{name}.ipynb"
    assert differences(read(path), execute_notebooks.executed(path)) == []


def test_differences_are_found():
    notebook = read(ROOT / "docs/notebooks/solvers.ipynb")
    assert differences(notebook, notebook) == []
    places = [(cell, output) for cell in notebook.cells for output in cell.get("outputs", [])]
    text = next(output for _, output in places if "diverged" in output.get("text", ""))
    for old, new in (("diverged", "eps"), ("z 0.4", "z 0.6"), ("  40 eval", "  60 eval")):
        changed = copy.deepcopy(notebook)
        for cell in changed.cells:
            for output in cell.get("outputs", []):
                if output == text:
                    assert old in output.text
                    output.text = output.text.replace(old, new)
        assert len(differences(notebook, changed)) >= 1, (old, new)
    gone = copy.deepcopy(notebook)
    next(cell for cell in gone.cells if pictures(cell)).outputs = []
    assert len(differences(notebook, gone)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_reads_well_without_running(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert len(text) < 600_000
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    counts = []
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        counts.append(cell.execution_count)
        assert len(cell.source.splitlines()) <= 50, cell.id
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result"), cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
        for picture in pictures(cell):
            alt = picture.metadata["image/png"]["alt"]
            assert len(alt) > 30, f"{cell.id} needs an alternative text"
            assert alt == cell.metadata.mystnb.image.alt, f"{cell.id}: execute it again"
            assert after is not None, cell.id
            assert after.cell_type == "markdown", f"{cell.id} needs a description below"
            assert after.source.startswith("*"), f"{cell.id} needs a description below"
            assert base64.b64decode(picture.data["image/png"])[1:4] == b"PNG"
    assert counts == list(range(1, len(counts) + 1)), "run scripts/notebooks.sh"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_nothing_of_the_machine_is_kept(path):
    notebook = read(path)
    again = execute_notebooks.clean(copy.deepcopy(notebook))
    assert again == notebook  # cleaned, so a second run gives a small difference
    for cell in notebook.cells:
        texts = [cell.source, printed(cell), json.dumps(cell.metadata)]
        for text in texts:
            found = re.search(r"(?<![\w.:/])/(?:home|tmp|work|root|Users|usr|opt)/|[A-Z]:\\", text)
            assert not found, f"{cell.id}: {found}"


def test_the_script_executes_all(tmp_path):
    """A copy of notebooks.sh, with a stand-in Python that only prints its arguments."""
    for name, text in {
        ".venv/bin/python": '#!/bin/sh\necho "$@"\n',
        "scripts/setup_env.sh": "[ $1 = requirements-docs.txt ]\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    script = shutil.copy(ROOT / "scripts/notebooks.sh", tmp_path / "scripts")
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "scripts/execute_notebooks.py\n")
    assert [path.stem for path in execute_notebooks.chosen([])] == NAMES


def test_the_command(tmp_path, capsys):
    """It executes in place, joins what was printed, and drops what the run leaves."""
    path = tmp_path / "own.ipynb"
    cell = nbformat.v4.new_code_cell('print("a", flush=True)\nprint("b")', id="one")
    cell.metadata = {"tags": ["varies"], "execution": {"iopub.execute_input": "now"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    assert execute_notebooks.main([str(path)]) == 0
    assert "own.ipynb" in capsys.readouterr().out
    (done,) = read(path).cells
    assert [output.text for output in done.outputs] == ["a\nb\n"]
    assert done.metadata == {"tags": ["varies"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("no JSON", "is no notebook"),
        ('{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "is no notebook"),
    ],
)
def test_files_that_are_no_notebooks(content, words, tmp_path, capsys):
    path = tmp_path / "own.ipynb"
    if content is not None:
        path.write_text(content)
    assert execute_notebooks.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert content is None or path.read_text() == content


def test_a_cell_that_fails(tmp_path, capsys):
    path = tmp_path / "own.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0", id="one")]), path
    )
    before = path.read_bytes()
    assert execute_notebooks.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ZeroDivisionError" in error
    assert path.read_bytes() == before
