"""Command-line parsing for the tools."""

import argparse
import math

from lib.runs.command_line import Parser


def experiment_parser(program: str, description: str) -> Parser:
    """Build the parser of the four tools: flags, and ``KEY VALUE`` overrides anywhere."""
    parser = Parser(prog=program, description=description)
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


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return value
