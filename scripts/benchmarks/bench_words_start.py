"""The quickstart's language model with a learned start of its solver and without: evaluations of f.

    python scripts/benchmarks/bench_words_start.py --json docs/data/words_start.json

Every network has the quickstart's settings, but for its start and its --f_thres in training. Each
is evaluated at several thresholds: in segments, and token by token, as text is generated. Every run
has one thread of the CPU. A second call with the same --json does the runs that are missing.
"""

import argparse
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from bench_generation import text, with_memory
from bench_words import DATA, launch
from helpers.arguments import Parser, write_json
from helpers.measure import in_turns, table
from helpers.runs import machine_of_one_thread, trained
from torch import Tensor

import deq_sequence
from deq_sequence.evaluation import evaluate
from deq_sequence.model import EVAL_STATES
from deq_sequence.options import run_folder
from deq_sequence.quickstart import SETTINGS
from deq_sequence.start import STARTS
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text.iterators import LMOrderedIterator
from lib.errors import check
from lib.runs.command_line import exit_code
from lib.runs.evaluation_loop import evaluating
from lib.solvers import anderson

NETWORKS = ["zero:6", "zero:3", "zero:2", "learned:3", "learned:2"]
WAYS = {"segments": (10, 64), "tokens": (40, 1)}  # streams of the text, tokens solved together
REFERENCE = ("zero", 6)  # that of the quickstart
CLOSE = 1.005  # a perplexity this much above another counts as equal
TOKENS, ROUNDS = 64, 7  # that are timed, and how often
SEGMENTS = 20  # that are solved tightly
APART = 0.01  # in log p: two states that are further apart are two fixed points


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_words_start.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bench_words_start.py", description=__doc__.splitlines()[0], least={"max_steps": 1}
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[1111], help="seeds")
    add("--networks", nargs="+", default=NETWORKS, help="START:EVALUATIONS in training")
    add("--f_thres", nargs="+", type=int, default=[2, 3, 4, 6], help="of each evaluation")
    add("--max_steps", type=int, help="segments of each evaluation; None: all")
    add("--out", type=Path, default=Path("words_start"), help="folder of the runs")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    networks = [_network(name) for name in options.networks]
    found = {"runs": []}
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text())
    found["machine"] = machine_of_one_thread()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for start, f_thres in networks:
            key = {"start": start, "f_thres": f_thres, "seed": seed}
            if not any(key.items() <= row.items() for row in found["runs"]):
                found["runs"].append(key | train(start, f_thres, seed, options))
                write_json(options.json, found)
    for row in found["runs"]:
        if row["start"] == "learned" and "apart" not in row:
            row["apart"] = apart(deq_sequence.load(_folder(row, options)), options)
            write_json(options.json, found)
    names = [_name(key) for key in _networks(found)]
    if list(found.get("ms_per_token", ())) != names:
        found["ms_per_token"] = speeds(found, options)
        write_json(options.json, found)
    print(f"{found['machine']}\n\n{report(found)}")


def _network(name: str) -> tuple[str, int]:
    start, _, number = name.partition(":")
    fits = start in STARTS and number.isdecimal() and int(number) > 0
    check(fits, "--networks", name, f"{' or '.join(STARTS)}, a colon and a number, as learned:3")
    return start, int(number)


def train(start: str, f_thres: int, seed: int, options: argparse.Namespace) -> dict:
    """Do one run; its figures."""
    folder = _folder({"start": start, "f_thres": f_thres, "seed": seed}, options)
    name, place = folder.name, options.out.resolve() / "runs"
    flags = f"--data {DATA} --seed {seed} --name {name} --num_threads 1 --f_start {start}".split()
    # Training ignores --eval_state; its validations choose the best weights by it.
    flags += f"--f_thres {f_thres} --eval_state {_states(start, f_thres)[0]}".split()
    flags = [*SETTINGS.split(), *flags, "--work_dir", str(place)]
    _, minutes = trained(lambda: launch(flags), name, folder)
    return {"minutes": minutes, "rows": figures(deq_sequence.load(folder), options)}


def _folder(row: dict, options: argparse.Namespace) -> Path:
    name = f"{row['start']}-{row['f_thres']}-{row['seed']}"
    return run_folder(str(options.out.resolve() / "runs"), "demo", name)


def _states(start: str, f_thres: int) -> list[str]:
    """The states of an evaluation; the network of the quickstart is compared in both."""
    return [state for state in EVAL_STATES if state == "value" or (start, f_thres) == REFERENCE]


def figures(trained: deq_sequence.TrainedModel, options: argparse.Namespace) -> list[dict]:
    """Perplexities of a network, by way, state and threshold."""
    args, model = trained.settings, trained.model
    corpus = get_lm_corpus(str(DATA), args.dataset)
    rows = []
    for way, (streams, length) in WAYS.items():
        for state in _states(args.f_start, args.f_thres):
            for f_thres in options.f_thres:
                row = {"way": way, "state": state, "f_thres": f_thres}
                model.eval_state = state
                for split in ("valid", "test"):
                    part = evaluate(
                        model,
                        getattr(corpus, split),
                        **{"batch_size": streams, "tgt_len": length, "mem_len": args.mem_len},
                        **{"f_thres": f_thres, "max_steps": options.max_steps or -1},
                    )
                    row[split] = part.perplexity
                rows.append(row | {"residual": part.rel_residual, "nfe": part.nfe})
    model.eval_state = args.eval_state
    return rows


def speeds(found: dict, options: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per token of generation, each network at the threshold of its training.

    The networks of one seed take turns, and read the same text.
    """
    models = {
        _name(key): deq_sequence.load(_folder(runs[0], options))
        for key, runs in _networks(found).items()
    }
    ids = text(next(iter(models.values())), TOKENS)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn, name in in_turns(models, ROUNDS + 1):
        model, f_thres = models[name].model, models[name].settings.f_thres
        with evaluating(model):
            before = time.process_time()
            with_memory(model, ids, f_thres)
            if turn:  # the first calls are slower
                times[name].append(time.process_time() - before)
    return {name: 1000 * median(values) / len(ids) for name, values in times.items()}


def apart(trained: deq_sequence.TrainedModel, options: argparse.Namespace) -> dict:
    """How often a tight solve ends at another fixed point from the learned start than from zeros.

    Both solve the segments of the test text with the same memory.
    """
    model, start = trained.model, trained.model.start
    text = get_lm_corpus(str(DATA), trained.settings.dataset).test
    model.f_solver = partial(anderson, eps=1e-6)
    segments = LMOrderedIterator(text, *WAYS["segments"])
    mems: list[Tensor] = []
    found = {"tokens": 0, "apart": 0, "largest": 0.0}
    with evaluating(model):
        for data, target, _ in itertools.islice(segments, options.max_steps or SEGMENTS):
            ends = []
            for model.start in (None, start):
                loss, _, kept = model.token_figures(data, target, mems, 200)
                ends.append(loss)
            mems, off = kept, (ends[0] - ends[1]).abs()
            found["tokens"] += off.numel()
            found["apart"] += int((off > APART).sum())
            found["largest"] = max(found["largest"], off.max().item())
    return found


def report(found: dict) -> str:
    """Two tables: the perplexities, and the evaluations that suffice; and the fixed points."""
    parts = perplexities(found), evaluations(found), fixed_points(found)
    return "\n\n".join(part for part in parts if part)


def perplexities(found: dict) -> str:
    numbers = sorted({row["f_thres"] for run in found["runs"] for row in run["rows"]})
    head = ["start", "in training", "CPU minutes", "seeds", "state", "read in"]
    head += [f"{n} evaluations" for n in numbers] + ["first and last residual"]
    cells = []
    for key, runs in _networks(found).items():
        for state in _states(*key):
            for way in WAYS:
                rows = [_mean(runs, way, state, n) for n in numbers]
                minutes = f"{mean(run['minutes'] for run in runs):.1f}"
                values = [f"{row['valid']:.1f}, {row['test']:.1f}" for row in rows]
                ends = f"{rows[0]['residual']:.0e}, {rows[-1]['residual']:.0e}"
                first = [key[0], f"{key[1]}", minutes, f"{len(runs)}", state, way]
                cells.append([*first, *values, ends])
    return table(head, cells)


def evaluations(found: dict) -> str:
    """The fewest evaluations with the perplexities (valid and test) of the reference."""
    networks = _networks(found)
    base = networks.get(REFERENCE)
    if base is None:
        return "no run zero:6 to compare with"
    head = ["start", "in training", "state", "in evaluation", "in generation", "ms per token"]
    cells = []
    for key, runs in networks.items():
        speed = f"{found['ms_per_token'][_name(key)]:.1f}"
        for state in _states(*key):
            fewest = [_fewest(runs, base, way, state) for way in WAYS]
            cells.append([key[0], f"{key[1]}", state, *fewest, speed])
    return table(head, cells)


def fixed_points(found: dict) -> str:
    """How often the two starts lead to different fixed points."""
    rows = [row["apart"] for row in found["runs"] if "apart" in row]
    if not rows:
        return ""
    tokens, others = (sum(row[name] for row in rows) for name in ("tokens", "apart"))
    return (
        f"Solved to a residual of 1e-6, both starts give log p within {APART} of each other for "
        f"{tokens - others} of {tokens} tokens of the test text."
    )


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}:{key[1]}"


def _fewest(runs: list[dict], base: list[dict], way: str, state: str) -> str:
    goal = _mean(base, way, "point", 6)
    numbers = sorted({row["f_thres"] for row in runs[0]["rows"]})
    for n in numbers:
        row = _mean(runs, way, state, n)
        if all(row[split] <= CLOSE * goal[split] for split in ("valid", "test")):
            return f"{n}"
    return "none"


def _networks(found: dict) -> dict[tuple[str, int], list[dict]]:
    networks: dict[tuple[str, int], list[dict]] = {}
    for row in found["runs"]:
        networks.setdefault((row["start"], row["f_thres"]), []).append(row)
    return networks


def _mean(runs: list[dict], way: str, state: str, f_thres: int) -> dict[str, float]:
    """The figures of one setting, means over the seeds."""
    key = {"way": way, "state": state, "f_thres": f_thres}
    rows = [row for run in runs for row in run["rows"] if key.items() <= row.items()]
    return {name: mean(row[name] for row in rows) for name in ("valid", "test", "residual")}


if __name__ == "__main__":
    sys.exit(main())
