"""What the command lines of the benchmarks share."""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

import torch

from lib.errors import InputError, check, did_you_mean
from lib.runs import command_line


class Parser(command_line.Parser):
    """The parser of all commands, with the flags that every benchmark has.

    Args:
        least: the least value of a number, by the name of its flag. None is always accepted.
    """

    def __init__(self, *, least: dict[str, int] | None = None, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, **options)
        self._least = least or {}
        self.add_argument(
            "--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one"
        )
        self.add_argument("--json", type=Path, help="write all figures here")

    def parse_args(self, args=None, namespace=None):
        """As in argparse; ``device`` is a torch.device, and ``json`` can be written."""
        found = super().parse_args(args, namespace)
        there = torch.cuda.is_available()
        if found.device == "cuda" and not there:
            raise InputError("--device cuda: no GPU is available, leave it out for the CPU")
        found.device = torch.device(found.device or ("cuda" if there else "cpu"))
        if found.json is not None and not found.json.parent.is_dir():
            raise InputError(f"--json: there is no folder {found.json.parent}")
        for name, least in self._least.items():
            value = getattr(found, name)
            check(value is None or value >= least, f"--{name}", value, f"at least {least}")
        return found


def chosen(flag: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a comma-separated list, each once, in their order.

    Raises:
        InputError: a name is not in ``known``.
    """
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f": choose from {', '.join(known)}")
            raise InputError(f"{flag}: unknown {name!r}{hint}")
    return names


def write_json(path: Path | None, figures) -> None:
    """Write figures to a file; without a path write nothing."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
