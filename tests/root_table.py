"""Problems x solvers: what each needs. Prints the table:  python tests/root_table.py

Each entry is the number of evaluations and products with the Jacobian until ||f(z) - z|| is below
1e-8, of 300 at most; a dash where it is not. A claim is false where a solve calls itself converged
and F is not that small at its result.

With --renew the counts reached are written to tests/data/root_counts.json, which the tests hold.
"""

import json
import sys
from functools import partial
from pathlib import Path

from lib.solvers import (
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    gmres,
    newton_krylov,
)
from root_problems import PROBLEMS, RootProblem

EPS, MOST = 1e-8, 300
DATA = Path(__file__).parent / "data" / "root_counts.json"
SOLVERS = {
    "plain": fixed_point_iteration,
    "anderson": anderson,
    "anderson m=12": partial(anderson, m=12),
    "anderson restart": partial(anderson, restart=True),
    "broyden": broyden,
    "broyden ls": partial(broyden, ls=True),
    "newton": newton_krylov,
    "newton 0, 20": partial(newton_krylov, warmup=0, inner=20),
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


def main() -> int:
    found = {(p.name, name): solve(p, name) for p, name in pairs()}
    print(f"{'':32}" + "".join(f"{name:>17}" for name in SOLVERS))
    for problem in PROBLEMS:
        cells = [found.get((problem.name, name), ("", False)) for name in SOLVERS]
        texts = [("-" if n is None else str(n)) + ("!" if wrong else "") for n, wrong in cells]
        print(f"{problem.name:32}" + "".join(f"{text:>17}" for text in texts))
    tried = {name: [v for (_, s), v in found.items() if s == name] for name in SOLVERS}
    solved = {name: sum(n is not None for n, _ in values) for name, values in tried.items()}
    print(f"{'solved':32}" + "".join(f"{f'{solved[n]} of {len(tried[n])}':>17}" for n in SOLVERS))
    counts = {name: sum(n or 0 for n, _ in values) for name, values in tried.items()}
    print(f"{'evaluations of these':32}" + "".join(f"{counts[n]:>17}" for n in SOLVERS))
    wrong = sum(wrong for _, wrong in found.values())
    print(f"solved {sum(solved.values())} of {len(found)}; false claims of convergence: {wrong}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        DATA.write_text(json.dumps(reached(), indent=1) + "\n")
    else:
        sys.exit(main())
