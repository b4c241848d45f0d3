"""The flags that the commands share that use a trained model: which one, where, how it solves."""

import argparse

from deq_sequence.trained import KIND, TrainedModel, build, find_device, of_run
from lib.errors import check_count, naming
from lib.runs.command_line import Parser
from lib.runs.model_file import read_model_file


def add_model(parser: Parser) -> None:
    """The flags that choose a model and its device."""
    parser.add_argument(
        "model",
        metavar="RUN",
        help="folder of a run, or a file that scripts/export_weights.py made",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def load_model(args: argparse.Namespace) -> TrainedModel:
    """The model that :func:`add_model`'s flags name."""
    with naming("--device"):
        device = find_device(args.device)
    return build(read_model_file(args.model, KIND, of_run), device)


def check_thresholds(trained: TrainedModel, f_thres: list[int], mem_len: list[int]) -> None:
    """Refuse values of --f_thres and --mem_len that the model cannot have."""
    for value in f_thres:
        check_count("--f_thres", value)
        trained.model.deq.grad.refuse_threshold(value, "--f_thres")
    for value in mem_len:
        check_count("--mem_len", value, 0)
