"""Figures of a run: what its solvers did, while it trains; tables and curves at its end."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from lib.errors import is_number, needs
from lib.runs.checkpoint import check_form
from lib.runs.processes import Processes
from lib.runs.run_folder import Run
from lib.solvers.stats import PassStats, SolverStats

CURVES = "curves.png"
BEFORE = "this run, before its equilibrium phase"  # a row's title: no stack trained for as long
PASSES = ("forward", "backward")
_DIVERGED_SHOWN = 20  # most log lines on diverged solves; metrics record all


def stats_state(stats: SolverStats) -> list[dict]:
    """Solver statistics as plain containers, for a checkpoint."""
    return [asdict(stats.forward), asdict(stats.backward)]


def check_stats(states, processes: int) -> None:
    """Refuse anything else than a list of :func:`stats_state`, one per process."""
    check_form(states, [[..., ...]] * processes, "solver_stats")
    figures = {"nfe": 0, "abs_residual": 0.0, "rel_residual": 0.0, "broken": False}
    for rank, passes in enumerate(states):
        for number, found in enumerate(passes):
            own = asdict(PassStats())
            if isinstance(found, dict):
                own |= {name: figures for name in ("last", "last_broken") if found.get(name) != {}}
            check_form(found, own, f"solver_stats[{rank}][{number}]")


def restore_stats(state: list[dict], stats: SolverStats) -> None:
    """Restore :func:`stats_state`."""
    forward, backward = state
    stats.forward, stats.backward = PassStats(**forward), PassStats(**backward)


def summed_stats(stats: SolverStats, processes: Processes) -> SolverStats:
    """Solver statistics summed over all processes, each of which makes this call."""
    both = (stats.forward, stats.backward)
    table = [[s.solves, s.nfe, s.abs_residual, s.rel_residual, s.broken] for s in both]
    sums = processes.sum(torch.tensor(table, dtype=torch.float64)).tolist()
    return SolverStats(*(PassStats(int(n), int(nfe), a, r, int(b)) for n, nfe, a, r, b in sums))


def broken_solves(stats: SolverStats) -> list[int]:
    """The number of broken solves of each pass."""
    return [getattr(stats, which).broken for which in PASSES]


def broken_since(before: list[int], stats: SolverStats) -> list[tuple[str, float, int]]:
    """Pass, relative residual and nfe of each solve that broke since :func:`broken_solves`.

    Of several in one pass, all have the figures of the last.
    """
    found = []
    for which, old, new in zip(PASSES, before, broken_solves(stats), strict=True):
        last = getattr(stats, which).last_broken
        found += [(which, last["rel_residual"], last["nfe"]) for _ in range(new - old)]
    return found


def report_diverged(found: list[list[tuple]], run: Run, step: int, counts: dict) -> None:
    """Log, record and count :func:`broken_since` of each process."""
    for rank, solves in enumerate(found):
        for which, residual, nfe in solves:
            counts[f"diverged_{which}"] += 1
            values = {"pass": which, "rel_residual": residual, "nfe": nfe, "rank": rank}
            run.record("diverged", step, **values)
            shown = counts["diverged_forward"] + counts["diverged_backward"]
            if shown <= _DIVERGED_SHOWN:
                run.log(
                    f"step {step} | the {which} solver diverged: relative residual "
                    f"{residual:.2e} after {nfe} evaluations"
                    + (f" in process {rank}" if len(found) > 1 else "")
                    + (" (the last line on this)" if shown == _DIVERGED_SHOWN else "")
                )


def solver_figures(stats: SolverStats) -> tuple[dict[str, float], str]:
    """Means of both passes, for metrics and as text for the log."""
    values, text = {}, ""
    for which in PASSES:
        passed: PassStats = getattr(stats, which)
        if passed.solves:
            means = passed.means()
            values |= {f"{which}_{name}": value for name, value in means.items()}
            text += f" | {which[0]} res {means['rel_residual']:.2e} nfe {means['nfe']:.1f}"
            text += f" broken {means['broken']}" if means["broken"] else ""
    return values, text


def table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of three aligned columns."""
    width = max(len(row[0]) for row in rows)
    return [f"{a:<{width}}  {b:>14}  {c:>10}".rstrip() for a, b, c in rows]


def solver_rows(records: list[dict], border: int, evaluated: dict) -> list[tuple[str, str, str]]:
    """Rows with residual and nfe: training means after step ``border``, and the evaluation mean.

    A pass without solves has no row.
    """
    found = []
    for which in PASSES:
        means = {}
        for name in ("rel_residual", "nfe"):
            steps, values = series(records, "train", f"{which}_{name}")
            solved = [value for step, value in zip(steps, values, strict=True) if step > border]
            if solved:
                means[name] = sum(solved) / len(solved)
        if len(means) == 2:
            found.append((f"{which}, training mean", means))
    if evaluated["nfe"]:
        found.append(("forward, evaluation mean", evaluated))
    return [
        ("equilibrium solves", "rel. residual", "nfe"),
        *((title, f"{v['rel_residual']:.2e}", f"{v['nfe']:.1f}") for title, v in found),
    ]


def finite(record: dict) -> dict:
    """The figures of a record: without NaN, infinity, and integers beyond a float."""
    return {k: v for k, v in record.items() if is_number(v) and abs(v) < 1e300}


def series(records: list[dict], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``name`` in the records of ``kind`` that have such a number."""
    found = [(r["step"], r[name]) for r in records if r["kind"] == kind and is_number(r.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(records: list[dict], border: int, path, draw: Callable) -> None:
    """Write a PNG (a path or a file): training and residuals over the steps.

    A line marks ``border``, the first step at equilibrium. ``draw`` draws the training curves on
    the axes it is given.
    """
    # Here, as it is slow, and optional for training.
    with needs("runs"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw(top)
    top.set_title("stacked pre-training, then equilibrium")
    top.legend()
    for which in PASSES:
        steps, residuals = series(records, "train", f"{which}_rel_residual")
        if steps:
            bottom.plot(steps, residuals, label=f"{which} residual")
    bottom.set(yscale="log", xlabel="step", ylabel="relative residual")
    if bottom.lines:
        bottom.legend()
    for axes in (top, bottom):
        axes.axvline(border, color="black", lw=0.8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
