"""The package: its wheel, an install of the core alone, declared imports, types."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import files, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.errors import needs

ROOT = Path(__file__).parents[1]
EXTRAS = ("matplotlib", "PIL", "safetensors", "sklearn", "tensorboardX", "torchvision", "yacs")


def run(*command, **options):
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for room in ("lib", "tests", "docs"):
        shutil.copytree(ROOT / room, source / room, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})"
    done = run(sys.executable, "-c", code, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def with_needs(*names: str) -> set[str]:
    """These distributions, and those that they need, in this environment."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return found


def link(names: set[str], packages: Path) -> None:
    """Make links to the distributions of this environment: nothing is fetched or copied."""
    for name in names:
        for file in files(name):
            top = file.parts[0]
            if top != ".." and top != "__pycache__" and not (packages / top).exists():
                (packages / top).symlink_to(Path(file.locate()).parents[len(file.parts) - 1] / top)


@pytest.fixture(scope="module")
def core_python(tmp_path_factory, wheel):
    """The Python of an environment with the wheel, torch, numpy, and what these two need."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    done = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    packages = Path(done.stdout.strip())
    link(with_needs("torch", "numpy"), packages)
    with zipfile.ZipFile(wheel) as archive:  # a wheel of Python files alone is installed so
        archive.extractall(packages)
    return python


def in_core(core_python, code, tmp_path):
    """Run code outside of the checkout, so that only the wheel's lib can be found."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return run(core_python, "-c", code, cwd=tmp_path, env=environment)


def test_wheel_is_small_and_holds_lib_alone(wheel):
    assert wheel.stat().st_size < 150_000
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "lib").rglob("*.py")}
    in_lib = {name for name in names if name.startswith("lib/")}
    assert in_lib == {*sources, "lib/py.typed"}
    assert all(".dist-info/" in name for name in names - in_lib)


def test_the_core_works_with_torch_and_numpy_alone(core_python, tmp_path):
    """All of lib except lib.runs is imported; then the README's layer trains on its digits."""
    (beside := tmp_path / "beside").mkdir()
    link(with_needs("scikit-learn"), beside)
    readme = (ROOT / "README.md").read_text("utf-8")
    (layer,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    code = f"""
import importlib, pkgutil, sys
from importlib.util import find_spec
import lib

assert lib.__file__.startswith(sys.prefix), lib.__file__
found = [name for name in {EXTRAS} if find_spec(name)]
assert not found, found  # otherwise the imports below show nothing
for module in pkgutil.walk_packages(lib.__path__, "lib.", onerror=print):
    if not module.name.startswith("lib.runs"):
        importlib.import_module(module.name)

sys.path.append({str(beside)!r})
{layer.replace("range(300)", "range(60)")}
with torch.no_grad():
    print((model(x[1297:]).argmax(1) == y[1297:]).double().mean().item())
"""
    done = in_core(core_python, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.7  # one in ten by chance; the layer prints, too


def test_a_missing_extra_is_one_line(core_python, tmp_path):
    """Both commands in one process, which has imported torch once."""
    code = f"""
import runpy, sys
sys.argv = ["script"]
for room, script in ("DEQ-Sequence", "train_transformer"), ("MDEQ-Vision", "tools/cls_train"):
    sys.path.append({str(ROOT)!r} + "/" + room)
    try:
        runpy.run_path(f"{{sys.path[-1]}}/{{script}}.py", run_name="__main__")
    except SystemExit as error:
        print(error.code)
"""
    done = in_core(core_python, code, tmp_path)
    assert done.stdout == "2\n2\n", done.stderr
    words, images = done.stderr.splitlines()
    for line, script, extra in (
        (words, "train_transformer.py", "words"),
        (images, "cls_train.py", "images"),
    ):
        assert line.startswith(f"{script}: ")
        assert f"is not installed: run pip install -e '.[{extra}]'" in line


def test_an_import_of_our_own_that_fails_is_a_bug():
    with pytest.raises(ModuleNotFoundError), needs("runs"):
        import lib.no_such_module  # noqa: F401


def test_what_is_imported_is_declared():
    pytest.importorskip("deptry")
    done = run(sys.executable, "-m", "deptry", ".")
    assert done.returncode == 0, done.stderr


def test_types_of_lib():
    pytest.importorskip("pyright")
    # The package finds node in a wheel, so nothing is fetched.
    done = run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
