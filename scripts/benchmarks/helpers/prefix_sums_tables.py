"""The tables of what examples/prefix_sums_compared.py found."""

from collections.abc import Callable
from statistics import fmean

from helpers.measure import table

EQUILIBRIUM = "equilibrium"  # the name of its runs; those of other gradients begin with it, too


def blocks(found: dict) -> dict[str, str]:
    """Exact strings of all runs, and the solves of the equilibrium.

    Figures are means over the seeds; residuals are the largest.
    """
    groups: dict[tuple[str, int], list[dict]] = {}
    for run in found["runs"]:
        groups.setdefault((run["name"], run["steps"]), []).append(run)
    (ours,) = (runs for (name, _), runs in groups.items() if name == EQUILIBRIUM)
    lengths = sorted({test["bits"] for run in ours for test in run["tests"]})
    exact = [_row(*of, runs, lengths) for of, runs in groups.items()]
    head = ["", "steps", "seeds", "CPU s", *(f"{n:,} bits" for n in lengths), "residual at 512"]
    solves = [
        [
            f"{n:,}",
            f"{_over(ours, max, 'residual', n):.1e}",
            *(f"{_over(ours, fmean, 'evaluations', n, way):,.0f}" for way in ("plain", "windows")),
        ]
        for n in lengths
    ]
    return {
        "prefix sums": f"    {found['machine']}\n\n{table(head, exact)}",
        "prefix sums, solves": table(
            ["bits", "largest residual", "evaluations per bit, plain", "by windows"], solves
        ),
    }


def _row(name: str, steps: int, runs: list[dict], lengths: list[int]) -> list[str]:
    """Exact strings at each length that was tested."""
    tested = {test["bits"] for test in runs[0]["tests"]}
    exact = [f"{_over(runs, fmean, 'exact', n):.3f}" if n in tested else "" for n in lengths]
    solves = name.startswith(EQUILIBRIUM)
    residual = f"{_over(runs, max, 'residual', 512):.1e}" if solves else ""
    seconds = fmean(run["seconds"] for run in runs)
    return [name, str(steps), str(len(runs)), f"{seconds:.0f}", *exact, residual]


def _over(runs: list[dict], reduce: Callable, key: str, bits: int, way: str = "") -> float:
    """One figure of the tests at this length, over all runs."""
    return reduce(
        test[key]
        for run in runs
        for test in run["tests"]
        if test["bits"] == bits and way in test["way"]
    )
