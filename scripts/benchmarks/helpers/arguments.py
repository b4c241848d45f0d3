"""What the command lines of the benchmarks share."""

import argparse
from pathlib import Path

import torch

from lib.errors import InputError
from lib.runs import command_line


class Parser(command_line.Parser):
    """The parser of all commands, with the flags that every benchmark has."""

    def __init__(self, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, **options)
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
        return found
