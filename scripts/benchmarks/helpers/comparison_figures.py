"""Figures of compare_gradients.py: what a step costs and brings; loss curves by kind of gradient.

Runs with the Jacobian loss are in the tables alone. Every figure has a white ground of its own, so
it reads on light and on dark pages; its bytes depend on the data and on matplotlib's version alone.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can tell apart; a marker for each kind too.
KINDS = {
    "ift": ("#0072B2", "o"),
    "shine": ("#009E73", "s"),
    "jfb": ("#D55E00", "^"),
    "phantom": ("#CC79A7", "D"),
    "reversible": ("#E69F00", "P"),
    "unroll": ("#444444", "X"),
}
REFERENCE = "ift, anderson 30 / broyden 30"  # of all variants the closest to the exact gradient
LETTERS = {
    "anderson": "A", "broyden": "B", "gmres": "G", "bicgstab": "S", "newton_krylov": "N",
    "fixed_point_iteration": "P",
}  # fmt: skip
WHAT = {
    "words": ("validation perplexity", lambda figures: figures["perplexity"]),
    "digits": ("validation error, %", lambda figures: 100 * (1 - figures["accuracy"])),
}
COSTS_FILE, CURVES_FILE = "gradients.svg", "gradients-curves.svg"
_INK, _PALE = "#222222", "#bbbbbb"
_STYLE = {"svg.hashsalt": "gradients", "font.family": "DejaVu Sans", "font.size": 9,
          "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#8a8a8a",
          "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


def short_name(variant: dict) -> str:
    """Name a variant in a few signs, such as "ift A12 B12" or "phantom 3 A6"."""
    kind, _, options = variant["grad"].partition(":")
    options = dict(option.split("=") for option in options.split(",") if option)
    words = [kind, *(options[k] for k in ("steps", "refine") if k in options)]
    words += [w for k, w in (("form", "neumann"), ("checkpointing", "saved")) if k in options]
    own = kind in ("reversible", "unroll")
    words.append("" if own else _letter(variant["f_solver"]))
    words[-1] += str(variant["f_thres"])
    if kind == "ift":
        words.append(f"{_letter(variant['b_solver'])}{variant['b_thres']}")
    return " ".join(words)


def _letter(solver: str) -> str:
    return LETTERS[solver.partition(":")[0]]


def draw(found: dict, folder: Path) -> None:
    """Write both figures of the results of compare_gradients.py."""
    with rc_context(_STYLE):
        _save(_costs(found), folder / COSTS_FILE)
        _save(_curves(found), folder / CURVES_FILE)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasSVG(figure)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _plain(found: dict, task: str) -> list[dict]:
    return [o for o in found[task]["outcomes"] if not o["regularised"]]


def _kind(outcome: dict) -> str:
    return outcome["variant"]["grad"].partition(":")[0]


# ---- cost against gain -----------------------------------------------------------------------


def _costs(found: dict) -> Figure:
    """One row per task: after the same steps, and after the same time, over the cost of a step."""
    tasks = [task for task in WHAT if task in found]
    figure = Figure(figsize=(10.5, 4.7 * len(tasks)), facecolor="white", layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(grid, tasks, strict=True):
        plan = found[task]["plan"]
        titles = (f"after {plan['steps']} steps", f"after {plan['seconds']:g} s of training")
        for axes, when, title in zip(row, ("at_steps", "at_seconds"), titles, strict=True):
            _scatter(axes, _plain(found, task), when, WHAT[task][1])
            axes.set(xlabel="milliseconds per step", ylabel=f"{task}: {WHAT[task][0]}")
            axes.set_title(title, fontweight="bold")
    return figure


def _scatter(axes, outcomes: list[dict], when: str, height) -> None:
    points = [(1000 * o["seconds_per_step"], height(o[when])) for o in outcomes]
    for outcome, point in zip(outcomes, points, strict=True):
        colour, marker = KINDS[_kind(outcome)]
        axes.plot(*point, marker, color=colour, ms=7, mec="white", mew=0.6, zorder=3)
        if outcome["name"] == REFERENCE:
            axes.axhline(point[1], 0, 0.7, color=colour, ls="--", lw=1.2, zorder=1)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = (high - low) or 1.0
    low, high = low - 0.05 * room, high + 0.05 * room
    axes.set(xscale="log", xlim=(left / 1.15, right * 2.9), ylim=(low, high))
    ticks = [t for t in (50, 100, 200, 400, 800, 1600, 3200) if left / 1.15 < t < right * 1.3]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    # The labels stand in a column at the right, in the order of their points, without overlap.
    order = sorted(range(len(points)), key=lambda i: points[i][1])
    gap = 0.8 * (high - low) / max(len(points), 19)
    heights = _spread([points[i][1] for i in order], gap, low + gap / 2, high - gap / 2)
    for i, at in zip(order, heights, strict=True):
        colour, _ = KINDS[_kind(outcomes[i])]
        axes.annotate(
            short_name(outcomes[i]["variant"]), points[i], (right * 1.3, at), fontsize=8,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "lw": 0.7,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted values apart by ``gap`` or more, between ``low`` and ``high``, and little."""

    def bottom(group: list[float]) -> float:  # of values that stand ``gap`` apart
        span = gap * (len(group) - 1)
        return max(min(sum(group) / len(group) - span / 2, high - span), low)

    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    return [bottom(group) + i * gap for group in groups for i in range(len(group))]


# ---- curves ----------------------------------------------------------------------------------


def _curves(found: dict) -> Figure:
    """One row per task, one column per kind of gradient: its runs in colour, all others in grey."""
    tasks = [task for task in WHAT if task in found]
    kinds = [k for k in KINDS if any(_kind(o) == k for t in tasks for o in _plain(found, t))]
    size = (max(11, 1.9 * len(kinds)), 2.7 * len(tasks))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    grid = figure.subplots(len(tasks), len(kinds), sharex="row", sharey="row", squeeze=False)
    for row, task in zip(grid, tasks, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            for outcome in _plain(found, task):
                own = _kind(outcome) == kind
                line = [(p["seconds"], p["loss"]) for p in outcome["curve"]]
                colour, marker = KINDS[kind] if own else (_PALE, None)
                style = {"lw": 1.6, "zorder": 3} if own else {"lw": 0.7, "zorder": 1}
                axes.plot(*zip(*line, strict=True), color=colour, marker=marker, ms=4, **style)
                if outcome["name"] == REFERENCE:
                    axes.plot(*zip(*line, strict=True), "--", color=_INK, lw=1.2, zorder=2)
            axes.set_title(kind, color=KINDS[kind][0], fontweight="bold")
            axes.set(xlabel="seconds of training", xscale="log")
            axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        row[0].set_ylabel(f"{task}: training loss")
    return figure
