"""The flags that the commands share that use a trained model: which one, where, how it solves."""

import argparse

import torch

from deq_sequence.model import EVAL_STATES
from deq_sequence.options import EVAL_STATE
from deq_sequence.trained import KIND, TrainedModel, build, of_run
from lib.errors import check, check_count, naming
from lib.runs.command_line import Parser
from lib.runs.model_file import THREADS, find_device, read_model_file, use_few_threads


def add_model(parser: Parser) -> None:
    """The flags that choose a model, its device and its state."""
    add = parser.add_argument
    add("model", metavar="RUN", help="folder of a run, or a file of scripts/export_weights.py")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    threads = f"{THREADS}, and this flag overrules both; 0 is PyTorch's choice"
    add("--num_threads", type=int, default=argparse.SUPPRESS, help=threads)
    add("--eval_state", choices=EVAL_STATES, help=f"{EVAL_STATE}; None: the run's")


def load_model(args: argparse.Namespace) -> TrainedModel:
    """The model that :func:`add_model`'s flags name."""
    threads = getattr(args, "num_threads", None)
    if threads is not None:
        check_count("--num_threads", threads, 0)
        check(threads <= 1024, "--num_threads", threads, "at most 1024")
    if threads:
        torch.set_num_threads(threads)
    with naming("--device"):
        device = find_device(args.device)
    trained = build(read_model_file(args.model, KIND, of_run), device)
    trained.model.eval_state = args.eval_state or trained.model.eval_state
    if threads is None:
        use_few_threads(trained.model)
    return trained


def check_thresholds(trained: TrainedModel, f_thres: list[int], mem_len: list[int]) -> None:
    """Refuse values of --f_thres and --mem_len that the model cannot have."""
    for value in f_thres:
        check_count("--f_thres", value)
        trained.model.deq.grad.refuse_threshold(value, "--f_thres")
    for value in mem_len:
        check_count("--mem_len", value, 0)
