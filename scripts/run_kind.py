"""Which of the two packages trained a run."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from lib.errors import InputError, needs
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
