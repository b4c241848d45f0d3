"""What the commands about a run's folder share: the package that trained it, and their report."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lib.errors import InputError, needs
from lib.runs.atomic_files import atomic_write
from lib.runs.run_folder import SETTINGS

_KINDS = (SETTINGS, "deq_sequence", "words"), ("config.yaml", "mdeq_vision", "images")


def module_for(folder: Path, name: str) -> ModuleType:
    """The module of this name in the package that trained the run in ``folder``.

    It is imported only now, as the other package need not be installed.

    Raises:
        InputError: the folder holds no run.
    """
    for file, package, extra in _KINDS:
        if (folder / file).is_file():
            with needs(extra):
                return import_module(f"{package}.{name}")
    raise InputError(
        f"{folder} holds no run: expected a folder with settings.json or config.yaml, as training "
        "leaves it"
    )


def refuse_existing(out: Path | None) -> None:
    """Refuse --out that names a file: call this before the work."""
    if out is not None and out.exists():
        raise InputError(f"--out: {out} exists: give another name")


def keep(report, out: Path) -> None:
    """Print a report that has ``as_dict()``, and write its figures to a file."""
    print(report)
    with atomic_write(out) as file:
        file.write(f"{json.dumps(report.as_dict(), indent=1)}\n".encode())
    print(f"\n{out}")
