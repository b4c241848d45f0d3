"""State tracking: equilibria, and stacks of 3, 12 and 32 layers, up to 8 times the length trained.

    python scripts/benchmarks/bench_states.py --json docs/data/state_tracking.json

Trains DEQ-Sequence/state_tracking.sh for each group and seed: the equilibrium, and the same layer
stacked, with the same steps. Every run has one thread of the CPU, whatever --device says. A second
call with the same --json does the runs that are missing.
"""

import argparse
import json
import sys
from pathlib import Path

from helpers.arguments import Parser, write_json
from helpers.measure import table
from helpers.runs import (
    EQUILIBRIUM,
    machine_of_one_thread,
    on_one_thread,
    stack_flags,
    trained,
)

from lib.runs.command_line import exit_code
from lib.runs.run_folder import run_folder

SCRIPT = Path(__file__).resolve().parents[2] / "DEQ-Sequence/state_tracking.sh"
LONGER = {"A5": "--max_step 3500"}  # a table of 3,600 products has to be learnt first


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_states.py", lambda: run(parse(argv)), "calling it again")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_states.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--groups", nargs="+", default=["Z2", "S3", "A5"], help="groups")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of the equilibria")
    add("--stacks", nargs="*", type=int, default=[3, 12, 32], help="layers; with the first seed")
    add("--out", type=Path, default=Path("states"), help="folder of the runs")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    jobs = [(g, EQUILIBRIUM, seed) for g in options.groups for seed in options.seeds]
    jobs += [(g, layers, options.seeds[0]) for g in options.groups for layers in options.stacks]
    rows = []
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text())["runs"]
    machine = machine_of_one_thread()
    for job in jobs:
        if job not in [(row["group"], row["network"], row["seed"]) for row in rows]:
            rows.append(train(*job, options))
            write_json(options.json, {"machine": machine, "runs": rows})
    print(f"{machine}\n\n{report({'runs': rows})}")


def train(group: str, network: str | int, seed: int, options: argparse.Namespace) -> dict:
    """Do one run; its figures."""
    name, place = f"{network}-{seed}", options.out.resolve() / "runs"
    flags = f"--dataset state:{group} --seed {seed} --name {name} --num_threads 1".split()
    flags += LONGER.get(group, "").split()
    if network != EQUILIBRIUM:
        flags += stack_flags(network)
    flags += ["--work_dir", str(place)]
    folder = run_folder(str(place), f"state-{group}", name)
    records, minutes = trained(lambda: launch(flags), f"{name} of {group}", folder)
    figures = ("length", "exact", "rel_residual", "nfe")
    return {
        **{"group": group, "network": network, "seed": seed, "steps": records[-1]["step"]},
        "minutes": minutes,
        "tests": [{k: r[k] for k in figures} for r in records if r["kind"].startswith("final_")],
    }


def launch(flags: list[str]) -> int:
    """Train by the script, with more flags; the exit code."""
    return on_one_thread(["bash", str(SCRIPT), "train", *flags], PYTHON=sys.executable)


def report(found: dict) -> str:
    """A table: a line for each run; whole strings right at each length, then the residuals."""
    lengths = [test["length"] for test in found["runs"][0]["tests"]]
    head = ["group", "network", "seed", "steps", "CPU minutes"]
    head += [f"exact, {n}" for n in lengths] + ["residual, first to last", "evaluations"]
    return table(head, [_row(row) for row in found["runs"]])


def _row(row: dict) -> list[str]:
    solved = row["network"] == EQUILIBRIUM
    tests, network = row["tests"], row["network"] if solved else f"{row['network']} layers"
    ends = tests[0], tests[-1]
    return [
        *(row["group"], network, str(row["seed"]), str(row["steps"]), f"{row['minutes']:.1f}"),
        *(f"{test['exact']:.2f}" for test in tests),
        " to ".join(f"{test['rel_residual']:.0e}" for test in ends) if solved else "",
        " to ".join(f"{test['nfe']:.0f}" for test in ends) if solved else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
