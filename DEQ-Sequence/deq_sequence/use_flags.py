"""The flags that the commands share that use a trained model: which one, where, how it solves."""

import argparse

import torch

from deq_sequence.trained import KIND, TrainedModel, build, of_run
from lib.errors import check, check_count, naming
from lib.runs.command_line import Parser
from lib.runs.model_file import find_device, read_model_file


def add_model(parser: Parser) -> None:
    """The flags that choose a model and its device."""
    add = parser.add_argument
    add("model", metavar="RUN", help="folder of a run, or a file of scripts/export_weights.py")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")


def load_model(args: argparse.Namespace) -> TrainedModel:
    """The model that :func:`add_model`'s flags name."""
    check_count("--num_threads", args.num_threads, 0)
    check(args.num_threads <= 1024, "--num_threads", args.num_threads, "at most 1024")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
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
