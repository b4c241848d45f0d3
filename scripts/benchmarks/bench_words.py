"""The quickstart's language model: the equilibrium, and stacks of the same layer, in equal time.

    python scripts/benchmarks/bench_words.py --json docs/data/words.json

The stacks have the same parameters and settings, but for the steps: as many as take the time of the
equilibrium's training, by steps measured in turns. Every run has one thread of the CPU, whatever
--device says. A second call with the same --json does the runs that are missing.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import in_turns, table
from helpers.runs import (
    EQUILIBRIUM,
    NEVER,
    machine_of_one_thread,
    on_one_thread,
    stack_flags,
    trained,
)
from helpers.settings import ROOT
from helpers.trainers import next_step

from deq_sequence.command import build_model
from deq_sequence.evaluation import perplexity
from deq_sequence.options import parse as parse_training
from deq_sequence.quickstart import SETTINGS
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from lib.runs.command_line import exit_code
from lib.runs.run_folder import run_folder

DATA = ROOT / "DEQ-Sequence/data/demo"


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_words.py", lambda: run(parse(argv)), "calling it again")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_words.py", description=__doc__.splitlines()[0], least={"rounds": 1})
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds")
    add("--stacks", nargs="*", type=int, default=[3, 6], help="layers")
    add("--out", type=Path, default=Path("words"), help="folder of the runs")
    add("--rounds", type=int, default=20, help="steps of each network that are timed")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    found = {"runs": []}
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text())
    machine = machine_of_one_thread()
    found["machine"] = machine
    if "steps" not in found or not found["steps"].keys() >= {str(n) for n in options.stacks}:
        # Runs that are there keep the steps that they took.
        for key, timed in steps_in_equal_time(options.stacks, options.rounds).items():
            found[key] = timed | found.get(key, {})
    for seed in options.seeds:
        for network in (EQUILIBRIUM, *options.stacks):
            if (network, seed) not in [(row["network"], row["seed"]) for row in found["runs"]]:
                found["runs"].append(train(network, seed, found["steps"], options))
                write_json(options.json, found)
    print(f"{machine}\n\n{report(found)}")


def steps_in_equal_time(stacks: list[int], rounds: int) -> dict:
    """Time training steps in turns; the steps that fit into the equilibrium's training, by layers.

    Times are medians of CPU seconds, for one thread.
    """
    torch.set_num_threads(1)
    args = _arguments([])
    trainers = {layers: _trainer(NEVER, layers) for layers in {*stacks, args.n_layer}}
    trainers[EQUILIBRIUM] = _trainer(0, args.n_layer)
    batches = {name: trainer.batches() for name, trainer in trainers.items()}
    times: dict = {name: [] for name in trainers}
    for turn, name in in_turns(trainers, rounds + 2):
        before = time.process_time()
        next_step(trainers[name], batches[name])
        if turn >= 2:  # the first steps have no memory to attend to
            times[name].append(time.process_time() - before)
    cost = {name: median(values) for name, values in times.items()}
    solved = args.max_step - args.pretrain_steps
    whole = args.pretrain_steps * cost[args.n_layer] + solved * cost[EQUILIBRIUM]
    return {
        "seconds_per_step": {str(name): value for name, value in cost.items()},
        "steps": {str(layers): max(1, round(whole / cost[layers])) for layers in stacks},
    }


def _arguments(flags: list[str]) -> argparse.Namespace:
    return parse_training([*SETTINGS.split(), "--data", str(DATA), *flags])


def _trainer(pretrain_steps: int, layers: int) -> LMTrainer:
    args = _arguments(f"--pretrain_steps {pretrain_steps} --n_layer {layers}".split())
    args.max_step = NEVER  # the rate does not fall
    corpus, device = get_lm_corpus(args.data, args.dataset), torch.device("cpu")
    trainer = LMTrainer(args, build_model(args, corpus, device), corpus, device)
    trainer.model.train()
    return trainer


def train(network: str | int, seed: int, steps: dict, options: argparse.Namespace) -> dict:
    """Do one run; its figures."""
    name, place = f"{network}-{seed}", options.out.resolve() / "runs"
    flags = f"--data {DATA} --seed {seed} --name {name} --num_threads 1".split()
    if network != EQUILIBRIUM:
        flags += stack_flags(network)
        flags += ["--max_step", str(steps[str(network)])]
    flags = [*SETTINGS.split(), *flags, "--work_dir", str(place)]
    folder = run_folder(str(place), "demo", name)
    records, minutes = trained(lambda: launch(flags), name, folder)
    final = {r["kind"]: r for r in records if r["kind"].startswith("final_")}
    return {
        **{"network": network, "seed": seed, "steps": records[-1]["step"], "minutes": minutes},
        **{split: perplexity(final[f"final_{split}"]["loss"]) for split in ("valid", "test")},
        **{key: final["final_test"][key] for key in ("rel_residual", "nfe")},
    }


def launch(flags: list[str]) -> int:
    """Train with these flags; the exit code."""
    return on_one_thread([sys.executable, str(ROOT / "DEQ-Sequence/train_transformer.py"), *flags])


def report(found: dict) -> str:
    """A table: a line for each network, with the mean and the range of its seeds."""
    head = ["network", "steps", "ms per step", "CPU minutes", "seeds"]
    head += ["perplexity, valid", "perplexity, test", "residual", "evaluations"]
    networks = dict.fromkeys(row["network"] for row in found["runs"])
    return table(head, [_row(network, found) for network in networks])


def _row(network: str | int, found: dict) -> list[str]:
    rows = [row for row in found["runs"] if row["network"] == network]
    solved = network == EQUILIBRIUM

    def spread(key: str, digits: int = 1) -> str:
        values = [row[key] for row in rows]
        ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(rows) > 1 else ""
        return f"{mean(values):.{digits}f}{ends}"

    return [
        network if solved else f"{network} layers",
        str(rows[0]["steps"]),
        f"{1000 * found['seconds_per_step'][str(network)]:.0f}",
        spread("minutes"),
        str(len(rows)),
        *(spread("valid"), spread("test")),
        f"{mean(row['rel_residual'] for row in rows):.0e}" if solved else "",
        f"{mean(row['nfe'] for row in rows):.0f}" if solved else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
