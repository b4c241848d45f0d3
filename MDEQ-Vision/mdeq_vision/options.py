"""Command-line parsing for the tools."""

import argparse
import math
import sys

from lib.errors import InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises an InputError instead of printing the usage: one line, and exit code 2."""

    def error(self, message: str):
        raise InputError(message)


def experiment_parser(program: str, description: str) -> Parser:
    """Build the parser of the four tools: flags, and ``KEY VALUE`` overrides anywhere."""
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="yaml file, such as experiments/digits.yaml")
    add("--modelDir", metavar="DIR", help="OUTPUT_DIR: where runs lie")
    add("--logDir", metavar="DIR", help="LOG_DIR: where TensorBoard events lie")
    add("--dataDir", metavar="DIR", help="DATA_DIR: put before DATASET.ROOT")
    add("--testModel", metavar="FILE", help="TEST.MODEL_FILE: weights to evaluate")
    add("--percent", type=_share, metavar="P", help="PERCENT: share of the training batches")
    add("--max_time", type=float, metavar="MINUTES", help="MAX_TIME: save and stop within it")
    add("opts", nargs="*", metavar="KEY VALUE", help="overrides, such as TRAIN.LR 0.01")
    return parser


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Parse flags and overrides in any order.

    Raises:
        InputError: a flag is unknown or missing, or does not accept its value.
    """
    # parse_known_...: an override may be a negative number, which argparse would call a flag.
    args, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = did_you_mean(unknown[0].split("=")[0], flags, otherwise=" (see --help)")
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    return args


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return value
