"""Generation, token by token: kept memory against solving the whole text again, and warm starts.

    python scripts/benchmarks/bench_generation.py --json generation.json

All ways read the same tokens, which the model itself has drawn, and take turns in one process. The
memory is as long as the text, so that all of them compute the same probabilities. The last columns
are their mean and largest difference, in log p of the token that comes, from one solve of the whole
text to a residual of 1e-7: how far a way's own threshold is from that. On the CPU there is one
thread, and its own time counts, so that other processes matter less.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_turns, seconds, table
from torch import Tensor

import deq_sequence
from deq_sequence.generation import generate
from deq_sequence.model import DEQTransformerLM
from lib.runs.command_line import exit_code
from lib.runs.evaluation_loop import evaluating
from lib.solvers import anderson

WORDS = Path(__file__).resolve().parents[2] / "docs/models/words.safetensors"
KEPT, WARM, AGAIN = "memory kept", "memory kept, warm start", "whole text again"


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_generation.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    least = {"tokens": 2, "rounds": 1}
    parser = Parser(prog="bench_generation.py", description=__doc__.splitlines()[0], least=least)
    add = parser.add_argument
    add("--model", type=Path, default=WORDS, help="a run's folder, or an exported file")
    add("--tokens", type=int, default=128, help="length of the text")
    add("--rounds", type=int, default=5, help="how often each way reads the text")
    add("--f_thres", type=int, nargs="+", default=[6, 30], help="most evaluations per solve")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    trained = deq_sequence.load(options.model, options.device)
    model = trained.model
    model.reset_length(None, options.tokens)
    ids = text(trained, options.tokens).to(options.device)
    exact = of_next(exactly(model, ids), ids)
    ways: dict[tuple[str, int], Callable] = {
        (name, f_thres): partial(way, model, ids, f_thres)
        for f_thres in options.f_thres
        for name, way in WAYS.items()
    }
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    found: dict[tuple[str, int], tuple[Tensor, float]] = {}
    for action in ways.values():  # nothing is timed at its first call
        action()
    for _, way in in_turns(ways, options.rounds):
        outcome: list[Tensor] = []
        action = partial(_append, outcome, ways[way])
        with evaluating(model) as stats:
            times[way].append(_seconds(action, options.device))
        found[way] = outcome[0], stats.forward.means()["nfe"]
    off = {way: (of_next(p, ids) - exact).abs() for way, (p, _) in found.items()}
    rows = [
        {
            "way": name,
            "f_thres": f_thres,
            "tokens_per_s": len(ids) / statistics.median(times[name, f_thres]),
            "evaluations": found[name, f_thres][1],
            "mean_difference": off[name, f_thres].mean().item(),
            "largest_difference": off[name, f_thres].max().item(),
            "seconds": times[name, f_thres],
        }
        for name, f_thres in ways
    ]
    machine = describe_machine(options.device)
    write_json(options.json, {"machine": machine, "tokens": len(ids), "ways": rows})
    print(f"{machine} | {len(ids)} tokens, {options.rounds} rounds\n\n{report(rows)}")


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        return seconds(action, device)
    start = time.process_time()
    action()
    return time.process_time() - start


def of_next(p: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each token but the first: p (L, n_token), ids (L,) -> (L - 1,)."""
    return p[:-1].gather(1, ids[1:, None])[:, 0]


def _append(outcome: list[Tensor], way: Callable[[], Tensor]) -> None:
    outcome.append(way())


def text(trained: deq_sequence.TrainedModel, length: int) -> Tensor:
    """Ids (length,) of a text that the model draws."""
    begin = trained.begin("")
    drawn = generate(trained.model, trained.vocabulary, begin, length - len(begin), seed=1)
    return torch.tensor([trained.vocabulary.sym2idx[symbol] for symbol in begin + drawn])


def exactly(model: DEQTransformerLM, ids: Tensor) -> Tensor:
    """Log-probabilities (L, n_token) at each position, from one solve that converges."""
    solver = model.f_solver
    try:
        model.f_solver = partial(anderson, eps=1e-7)
        with evaluating(model):
            return model.log_probs(ids[:, None], f_thres=300)[:, 0]
    finally:
        model.f_solver = solver


def with_memory(
    model: DEQTransformerLM, ids: Tensor, f_thres: int, warm_start: bool = False
) -> Tensor:
    """Log-probabilities (L, n_token): each token's state is solved once, and kept."""
    rows, mems = [], []
    for token in ids:
        p, mems = model.log_prob(token.view(1, 1), mems, f_thres, warm_start=warm_start)
        rows.append(p)
    return torch.cat(rows)


def without_memory(model: DEQTransformerLM, ids: Tensor, f_thres: int) -> Tensor:
    """The same; for each token all states up to it are solved again."""
    ends = range(1, len(ids) + 1)
    return torch.cat([model.log_prob(ids[:end, None], [], f_thres)[0] for end in ends])


WAYS = {KEPT: with_memory, WARM: partial(with_memory, warm_start=True), AGAIN: without_memory}


def report(rows: list[dict]) -> str:
    head = ["f_thres", "way", "tokens per s", "ratio", "evaluations per solve"]
    head += ["mean difference", "largest"]
    base = {row["f_thres"]: row["tokens_per_s"] for row in rows if row["way"] == KEPT}
    cells = [
        [
            str(row["f_thres"]),
            row["way"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / base[row['f_thres']]:.2f}",
            f"{row['evaluations']:.1f}",
            f"{row['mean_difference']:.0e}",
            f"{row['largest_difference']:.0e}",
        ]
        for row in rows
    ]
    return table(head, cells)


if __name__ == "__main__":
    sys.exit(main())
