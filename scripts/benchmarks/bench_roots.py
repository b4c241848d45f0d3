"""What each solver needs for each root problem.

    python scripts/benchmarks/bench_roots.py

A problem counts as solved if ||f(z) - z|| falls below 1e-8 within 300 evaluations and products with
the Jacobian. A claim is false if a solve calls itself converged and F is not that small at its
result. With --renew, the counts of each solver and problem are written to
tests/data/root_counts.json, which the tests hold.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from helpers.measure import describe_machine, table
from helpers.root_problems import PROBLEMS, RootProblem

from lib.runs.command_line import Parser, exit_code
from lib.solvers import (
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    gmres,
    newton_krylov,
)

EPS, MOST = 1e-8, 300
COUNTS = Path(__file__).resolve().parents[2] / "tests/data/root_counts.json"
SOLVERS = {
    "plain iteration": fixed_point_iteration,
    "anderson": anderson,
    "anderson, m = 12": partial(anderson, m=12),
    "anderson, restart": partial(anderson, restart=True),
    "broyden": broyden,
    "broyden, line search": partial(broyden, ls=True),
    "newton_krylov": newton_krylov,
    "newton_krylov, warmup 0, inner 20": partial(newton_krylov, warmup=0, inner=20),
    "gmres": gmres,
    "bicgstab": bicgstab,
}
LINEAR = ("gmres", "bicgstab")


def solve(problem: RootProblem, name: str, **options) -> tuple[int | None, bool]:
    """The evaluations until it is solved, None where it is not; whether it says so wrongly."""
    options = {"threshold": MOST, "max_nfe": MOST, "eps": EPS, "stop_mode": "abs"} | options
    found = SOLVERS[name](problem.f, problem.x0, **options)
    claims = bool(found["converged"].all()) or found["reason"] == "eps"
    # Rounding of f itself, beside the eps.
    rounding = 1e-15 * problem.f(found["result"]).norm().item()
    true = problem.residual(found["result"]).norm().item() <= EPS + 10 * rounding
    return found["nfe"] + found["products"] if claims and true else None, claims and not true


def pairs() -> list[tuple[RootProblem, str]]:
    """Which solvers are tried on which problems: methods for affine maps on those alone."""
    return [(p, name) for p in PROBLEMS for name in SOLVERS if p.affine or name not in LINEAR]


def reached() -> dict[str, dict[str, int]]:
    """problem -> solver -> evaluations, for what is solved."""
    found: dict[str, dict[str, int]] = {}
    for problem, name in pairs():
        count, _ = solve(problem, name)
        if count is not None:
            found.setdefault(problem.name, {})[name] = count
    return found


def by_solver() -> dict[str, list[tuple[int | None, bool]]]:
    found = {name: [] for name in SOLVERS}
    for problem, name in pairs():
        found[name].append(solve(problem, name))
    return found


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_roots.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_roots.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--renew", action="store_true", help=f"write {COUNTS.name}, print nothing")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Print the totals, or renew the counts."""
    if options.renew:
        COUNTS.write_text(json.dumps(reached(), indent=1) + "\n")
        return
    print(describe_machine(torch.device("cpu")) + "\n")
    rows, wrong = [], 0
    for name, found in by_solver().items():
        counts = [count for count, _ in found if count is not None]
        wrong += sum(claim for _, claim in found)
        rows.append((name, f"{len(counts)} of {len(found)}", sum(counts)))
    print(table(("solver", "solved", "evaluations of the solved"), rows))
    print(f"\nFalse claims of convergence: {wrong}.")


if __name__ == "__main__":
    sys.exit(main())
