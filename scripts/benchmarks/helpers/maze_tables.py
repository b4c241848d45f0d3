"""Tables and the figure of examples/mazes.py and examples/maze_ablations.py, from their files."""

import statistics
from itertools import chain
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from helpers.measure import table

FIGURE_FILE = "maze-evaluations.png"
# Colours of Okabe and Ito, which colour-blind readers can tell apart; a marker each too.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def blocks(found: dict) -> dict[str, str]:
    return {
        "mazes": f"    {_machine(found)}\n\n{_solved(found)}",
        "mazes, networks": _networks(found),
        "mazes, correlation": _correlations(found),
    }


def ablations(found: dict) -> dict[str, str]:
    tests = list(found["rows"][0]["exact"])
    head = ["what is different", "parameters", "CPU seconds", *tests, "largest residual"]
    rows = [
        [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['cpu_seconds']:.0f}",
            *(f"{row['exact'][test]:.2f}" for test in tests),
            f"{row['largest_residual']:.0e}",
        ]
        for row in found["rows"]
    ]
    return {"mazes, ablations": table(head, rows)}


def _machine(found: dict) -> str:
    threads = found["threads"]
    return f"{found['date']} | {threads} thread{'s' * (threads > 1)} | torch {found['torch']}"


def _by_test(found: dict) -> dict[tuple[int, float], list[dict]]:
    """The tests of all seeds, by size and kind."""
    tests: dict[tuple[int, float], list[dict]] = {}
    for run in found["equilibria"]:
        for test in run["tests"]:
            tests.setdefault((test["size"], test["branching"]), []).append(test)
    return tests


def _solved(found: dict) -> str:
    rows = []
    for (size, branching), seeds in _by_test(found).items():
        scores = [statistics.fmean(test["exact"]) for test in seeds]
        every = {
            key: list(chain.from_iterable(test[key] for test in seeds))
            for key in ("path", "right_from", "evaluations", "exact")
        }
        right = [n for n, exact in zip(every["right_from"], every["exact"], strict=True) if exact]
        rows.append(
            [
                f"{size} x {size}, {'many junctions' if branching else 'long corridors'}",
                f"{len(seeds)} x {len(seeds[0]['exact'])}",
                f"{statistics.fmean(scores):.3f} ({min(scores):.3f})",
                f"{max(test['residual'] for test in seeds):.1e}",
                f"{statistics.fmean(every['path']):.0f}, {max(every['path'])}",
                f"{statistics.fmean(right):.0f}" if right else "-",
                f"{statistics.fmean(every['evaluations']):.0f}, {max(every['evaluations'])}",
            ]
        )
    head = ["cells", "seeds x mazes", "exact (worst seed)", "largest residual",
            "path: mean, longest", "right from", "at 1e-3: mean, most"]  # fmt: skip
    return table(head, rows)


def _networks(found: dict) -> str:
    sizes = sorted({size for size, _ in _by_test(found)})
    names = list(dict.fromkeys(stack["name"] for stack in found["stacks"]))
    runs: dict[str, list[dict]] = {"equilibrium": []}
    for run in found["equilibria"]:
        plain = (test for test in run["tests"] if not test["branching"])
        exact = {str(test["size"]): statistics.fmean(test["exact"]) for test in plain}
        runs["equilibrium"].append({**run, "exact": exact})
    for name in names:
        runs[f"stacked, {name}"] = [stack for stack in found["stacks"] if stack["name"] == name]
    rows = [
        [
            name,
            f"{own[0]['parameters']:,}",
            str(len(own)),
            f"{statistics.fmean(run['cpu_seconds'] for run in own):.0f}",
            *(f"{statistics.fmean(run['exact'][str(n)] for run in own):.3f}" for n in sizes),
        ]
        for name, own in runs.items()
    ]
    head = ["network", "parameters", "seeds", "CPU seconds", *(f"{n} x {n}" for n in sizes)]
    return table(head, rows)


def _correlation(tests: list[dict], key: str) -> float:
    """Of the path length with a figure, over the solved mazes of some tests."""
    pairs = [
        (path, figure)
        for test in tests
        for path, figure, exact in zip(test["path"], test[key], test["exact"], strict=True)
        if exact
    ]
    return torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].item()


def _correlations(found: dict) -> str:
    groups = {
        f"{size} x {size}": [[test] for test in seeds]
        for (size, branching), seeds in _by_test(found).items()
        if not branching
    }
    groups["all sizes"] = [
        [test for test in run["tests"] if not test["branching"]] for run in found["equilibria"]
    ]
    rows = []
    for name, seeds in groups.items():
        row = [name]
        for key in ("right_from", "evaluations"):
            found_here = [_correlation(tests, key) for tests in seeds]
            row.append(f"{min(found_here):.3f} to {max(found_here):.3f}")
        rows.append(row)
    return table(["long corridors", "right from", "at 1e-3"], rows)


def draw(found: dict, folder: Path) -> None:
    """Evaluations against path length, of the first seed in mazes with long corridors."""
    tests = [test for test in found["equilibria"][0]["tests"] if not test["branching"]]
    style = {"font.family": "DejaVu Sans", "font.size": 9,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    titles = {
        "right_from": "until the answer is right, and stays right",
        "evaluations": "until the relative residual is 1e-3",
    }
    with rc_context(style):
        figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        both = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (key, title) in zip(both, titles.items(), strict=True):
            for test, (colour, marker) in zip(tests, STYLES, strict=False):
                size = f"{test['size']} x {test['size']} cells"
                axes.plot(
                    test["path"], test[key], marker, color=colour, ms=3.5, mew=0, alpha=0.7,
                    label=size,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel="cells on the path")
            axes.set_title(title)
            axes.grid(alpha=0.25)
        both[0].set_ylabel("evaluations of f")
        both[0].legend(frameon=False)
        figure.savefig(folder / FIGURE_FILE, dpi=100, metadata={"Software": None})
