"""The rules of the house: style, who may import whom, file length, and an install that works."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.api import read_configuration

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for room in ("lib", "DEQ-Sequence", "MDEQ-Vision", "scripts")
    for path in (ROOT / room).rglob("*.py")
)


def run(*command, **options):
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "--no-cache", "."],
        ["-m", "ruff", "format", "--no-cache", "--diff", "."],
        # lint-imports, without relying on where its script was installed
        ["-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
    ],
    ids=["ruff check", "ruff format", "lint-imports"],
)
def test_linter_is_content(command):
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_linted():
    """The import contracts pass over a package that pyproject.toml does not list."""
    rooms = ["lib", "DEQ-Sequence/deq_sequence", "MDEQ-Vision/mdeq_vision"]
    packages = {Path(room).name for room in rooms if (ROOT / room / "__init__.py").exists()}
    options = read_configuration(str(ROOT / "pyproject.toml"))["session_options"]
    assert set(options["root_packages"]) == packages


def test_no_path_edits_and_no_eval():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"))
    ]
    assert not found, "\n".join(found)


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_does_not_ignore_lib():
    """Stock Python .gitignore files do: there, lib/ is build output."""
    done = run("git", "check-ignore", "--no-index", "--verbose", "lib/solvers.py")
    assert done.returncode == 1, done.stdout + done.stderr


def test_import_beside_an_unrelated_lib_folder(tmp_path):
    """As in the folder /, which has a lib/ of its own on most systems; no slow module is loaded."""
    (tmp_path / "lib").mkdir()
    # A namespace package, which that folder would become, has no __file__.
    code = """import sys, lib.errors, deq_sequence.command, mdeq_vision.command
assert lib.__file__ is not None
late = "torch._dynamo torch._inductor sympy sklearn torchvision matplotlib tensorboardX"
found = sys.modules.keys() & set(late.split())
assert not found, found"""
    done = run(sys.executable, "-E", "-c", code, cwd=tmp_path)  # -E: not thanks to a PYTHONPATH
    assert done.returncode == 0, done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup_env.sh reads, with a stand-in Python that only notes its arguments."""
    names = "setup.py pyproject.toml requirements.txt requirements-test.txt scripts/setup_env.sh"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$*" >>calls\ncase "$*" in *-r*) test ! -e cut-off;; esac\n')
    python.chmod(0o755)
    return tmp_path


def installs(checkout, requirements):
    """Run setup_env.sh; return its exit code and whether it called pip install."""
    calls = checkout / "calls"
    calls.write_text("")
    done = run("bash", checkout / "scripts/setup_env.sh", requirements, cwd=checkout)
    return done.returncode, f"-r {requirements}" in calls.read_text()


def test_setup_env_installs_when_something_changed(checkout):
    assert installs(checkout, "requirements.txt") == (0, True)
    assert installs(checkout, "requirements.txt") == (0, False)
    assert installs(checkout, "requirements-test.txt") == (0, True)
    assert installs(checkout, "requirements.txt") == (0, False)  # it was part of the other
    (checkout / "setup.py").write_text("changed")
    assert installs(checkout, "requirements.txt") == (0, True)


def test_setup_env_repairs_an_install_that_was_cut_off(checkout):
    assert installs(checkout, "requirements.txt") == (0, True)
    (checkout / "cut-off").touch()
    assert installs(checkout, "requirements-test.txt") == (1, True)
    (checkout / "cut-off").unlink()
    assert installs(checkout, "requirements.txt") == (0, True)


def test_setup_env_without_a_usable_python(checkout):
    shutil.rmtree(checkout / ".venv")
    done = run(
        "bash",
        checkout / "scripts/setup_env.sh",
        "requirements.txt",
        env={**os.environ, "PYTHON": "no-such-python"},
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no-such-python" in done.stderr
