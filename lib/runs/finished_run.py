"""What reports on finished runs share: tables, means at equilibrium, curves."""

from collections.abc import Callable, Sequence

from lib.errors import is_number, needs
from lib.runs.solver_figures import PASSES

CURVES = "curves.png"


def table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of three aligned columns; a row of empty strings is an empty line."""
    width = max(len(row[0]) for row in rows)
    return [f"{a:<{width}}  {b:>14}  {c:>10}".rstrip() for a, b, c in rows]


def solver_rows(records: list[dict], border: int, evaluated: dict) -> list[tuple[str, str, str]]:
    """Rows with residual and nfe: training means after step ``border``, and the evaluation mean.

    A pass without solves, such as the backward pass of some gradients, has no row.
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


def series(records: list[dict], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``name`` in the records of ``kind`` that have such a number."""
    found = [(r["step"], r[name]) for r in records if r["kind"] == kind and is_number(r.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(records: list[dict], border: int, path, draw: Callable) -> None:
    """Write a PNG (a path or a file): training and residuals over the steps.

    A line marks ``border``, the first step at equilibrium. ``draw`` draws the training curves on
    the matplotlib axes it is given.
    """
    # Imported here: it is slow, and optional for training.
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
