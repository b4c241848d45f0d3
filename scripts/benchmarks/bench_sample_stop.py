"""Evaluation with solves that stop by the batch, as published, and with solves that stop by sample.

    python scripts/benchmarks/bench_sample_stop.py --json docs/data/sample_stop.json

The trained models of docs/models evaluate their test data, as the trainers do: words in 10 streams
of segments; digits and scenes in the batches of their settings. "tokens" are the first 50 words of
40 streams, one by one. "batch" ends a solve when the residual over the batch is below eps. With
"sample" each sample leaves the solve when its own residual is. "batch, tighter" stops by the batch,
with the largest part of eps (of TIGHTER) that brings every sample below eps, too, or the smallest.

All three take turns in one process. On the CPU there is one thread, and its own time counts, so
that other processes matter less. The time is that of a whole evaluation, with its data.
"Evaluations" are those of f per sample, counted in f: on a batch of 90 it makes 90. "Samples above"
is the share of samples that end with a residual above eps.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from bench_words import DATA
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_turns, synchronize, table
from torch import Tensor

import deq_sequence
import mdeq_vision
from deq_sequence.evaluation import evaluate
from deq_sequence.text.corpus import get_lm_corpus
from lib.deq import SolverAttributes
from lib.runs.command_line import exit_code
from lib.runs.processes import Processes
from lib.solvers.maps import transformed
from mdeq_vision.datasets import get_cls_dataset, get_seg_dataset
from mdeq_vision.evaluation import evaluate_classification, evaluate_segmentation

MODELS = Path(__file__).resolve().parents[2] / "docs/models"
BATCH, SAMPLE, TIGHT = "batch", "sample", "batch, tighter"
TIGHTER = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)  # of eps


@dataclass(frozen=True)
class Task:
    """A model, and its evaluation at a threshold, which returns a figure."""

    model: SolverAttributes
    figure: str
    evaluate: Callable[[int], float]
    solves: tuple[tuple[int, float], ...]  # f_thres and eps


class Recorded:
    """A solver with options, which counts evaluations of f on samples, and what they reached.

    Args:
        solver: one of lib.solvers.
        goal: the residual that each sample should have.
        options: of the solver, such as stop and eps.
    """

    def __init__(self, solver: Callable[..., dict], goal: float, **options):
        self._solver, self._goal = partial(solver, **options), goal
        self.samples = self.evaluations = self.above = 0
        self.residual = 0.0  # the largest

    def __call__(self, f: Callable[[Tensor], Tensor], x0: Tensor, **options) -> dict:
        def change(map_: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def counted(z: Tensor) -> Tensor:
                self.evaluations += len(z)
                return map_(z)

            return counted

        solution = self._solver(transformed(f, change), x0, **options)
        self.samples += len(x0)
        self.above += int((solution["residual"] >= self._goal).sum())
        self.residual = max(self.residual, solution["residual"].max().item())
        return solution


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_sample_stop.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bench_sample_stop.py",
        description=__doc__.splitlines()[0],
        least={"rounds": 1, "samples": 1},
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="what is evaluated")
    add("--rounds", type=int, default=3, help="how often each evaluation is timed")
    add(
        "--samples",
        type=int,
        help="at most so many images, or segments of a stream; default: all; tokens: 50",
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name in options.tasks:
        task = TASKS[name](options)
        for f_thres, eps in task.solves:
            rows += measure(name, task, f_thres, eps, options)
    found = {"machine": describe_machine(options.device), "rounds": options.rounds, "rows": rows}
    write_json(options.json, found)
    print(report(found))


def measure(
    name: str, task: Task, f_thres: int, eps: float, options: argparse.Namespace
) -> list[dict]:
    """The figures of all ways of stopping, at a threshold and a tolerance."""
    ways = {BATCH: {"stop": "batch", "eps": eps}, SAMPLE: {"stop": "sample", "eps": eps}}
    found: dict[str, dict] = {}
    own = task.model.f_solver

    def measured(way: str) -> float:
        task.model.f_solver = solver = Recorded(own, eps, **ways[way])
        start = _now(options.device)
        figure = task.evaluate(f_thres)
        seconds = _now(options.device) - start
        found[way] = {
            "figure": figure,
            "evaluations": solver.evaluations / solver.samples,
            "above": solver.above / solver.samples,
            "residual": solver.residual,
        }
        return seconds

    try:
        for way in tuple(ways):  # nothing is timed at its first call
            measured(way)
        for part in TIGHTER if found[BATCH]["above"] and not found[SAMPLE]["above"] else ():
            ways[TIGHT] = {"stop": "batch", "eps": part * eps}
            measured(TIGHT)
            if not found[TIGHT]["above"]:
                break
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _, way in in_turns(ways, options.rounds):
            seconds[way].append(measured(way))
    finally:
        task.model.f_solver = own
    key = {"task": name, "figure_name": task.figure, "f_thres": f_thres, "goal": eps}
    return [key | {"way": way, "seconds": seconds[way]} | ways[way] | found[way] for way in ways]


def _now(device: torch.device) -> float:
    synchronize(device)
    return process_time() if device.type == "cpu" else perf_counter()


def words(options: argparse.Namespace, streams: int, length: int, most: int) -> Task:
    trained = deq_sequence.load(MODELS / "words.safetensors", options.device)
    args, model = trained.settings, trained.model
    text = get_lm_corpus(str(DATA), args.dataset).test
    sizes = {"batch_size": streams, "tgt_len": length, "mem_len": args.mem_len}
    sizes["max_steps"] = min(most, options.samples or most)

    def perplexity(f_thres: int) -> float:
        return evaluate(model, text, f_thres=f_thres, **sizes).perplexity

    solves = ((args.f_thres, 1e-3), (100, 1e-3), (100, 1e-5))
    return Task(model, "perplexity", perplexity, solves)


def images(options: argparse.Namespace, name: str) -> Task:
    trained = mdeq_vision.load(MODELS / f"{name}.safetensors", options.device)
    model, cfg = trained.model, trained.settings
    cfg.defrost()
    cfg.TEST.NUM_SAMPLES = options.samples or 0
    classifies = isinstance(model, mdeq_vision.MDEQClsNet)
    data = (get_cls_dataset if classifies else get_seg_dataset)(cfg, "test")
    action = evaluate_classification if classifies else evaluate_segmentation

    def score(f_thres: int) -> float:
        model.f_thres = f_thres
        found = action(cfg, model, data, device=options.device, processes=Processes())
        return 100 * found.figures[found.score]

    figure = "top 1, %" if classifies else "mean IoU, %"
    return Task(model, figure, score, ((model.f_thres, 1e-3), (100, 1e-5)))


TASKS: dict[str, Callable[[Namespace], Task]] = {
    "words": partial(words, streams=10, length=64, most=100),
    "tokens": partial(words, streams=40, length=1, most=50),
    "digits": partial(images, name="digits"),
    "scenes": partial(images, name="scenes"),
}


def report(found: dict) -> str:
    head = ["evaluation", "f_thres", "eps", "stop", "evaluations", "CPU s", "ratio", "score"]
    head += ["largest residual", "samples above"]
    cells, base = [], 1.0
    for row in found["rows"]:
        seconds = median(row["seconds"])
        base = seconds if row["way"] == BATCH else base
        cells.append(
            [
                f"{row['task']} ({row['figure_name']})",
                str(row["f_thres"]),
                f"{row['eps']:g}",
                row["way"],
                f"{row['evaluations']:.1f}",
                f"{seconds:.2f}",
                f"{seconds / base:.2f}",
                f"{row['figure']:.2f}",
                f"{row['residual']:.1e}",
                f"{100 * row['above']:.1f} %",
            ]
        )
    return f"    {found['machine']}, medians of {found['rounds']} rounds\n\n{table(head, cells)}"


if __name__ == "__main__":
    sys.exit(main())
