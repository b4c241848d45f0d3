"""Draw what a DEQ is, from real solves: python scripts/draw_equilibrium.py [file.svg]

Left: the layer as a loop, its fixed point and its gradient. Middle: the iterates of three solvers
of lib.solvers on one layer with a state of two numbers. Right: their residuals. The picture has a
white ground of its own, so it reads on light and on dark pages.
"""

import math
import sys
from pathlib import Path

try:
    import torch
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from torch import Tensor

    from lib.solvers import anderson, broyden, fixed_point_iteration
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

FILE = Path("docs/figures/equilibrium.svg")
EPS = 1e-8
SHOWN = 40  # iterates; later ones lie under the star
# Colours of Okabe and Ito, which colour-blind readers can tell apart.
SOLVERS = {
    "plain iteration": (fixed_point_iteration, "#D55E00", "o"),
    "Anderson": (anderson, "#0072B2", "s"),
    "Broyden": (broyden, "#009E73", "^"),
}
INK, PALE = "#222222", "#8a8a8a"


def layer(z: Tensor) -> Tensor:
    """f(z, x) = tanh(W z + x): W turns by 65 degrees and shrinks to 0.95; z is (1, 2)."""
    turn, x = math.radians(65), torch.tensor([0.35, -0.25], dtype=z.dtype)
    c, s = 0.95 * math.cos(turn), 0.95 * math.sin(turn)
    return torch.tanh(z @ torch.tensor([[c, s], [-s, c]], dtype=z.dtype) + x)


def solve(solver) -> tuple[list[Tensor], list[float], Tensor]:
    """Return the points at which f was evaluated, the residuals there, and the solution."""
    points = []

    def f(z: Tensor) -> Tensor:
        points.append(z[0].clone())
        return layer(z)

    start = torch.tensor([[-0.9, 0.9]], dtype=torch.float64)
    solution = solver(f, start, threshold=200, eps=EPS)
    if not solution["converged"].all():
        raise RuntimeError(f"{solver.__name__} did not converge to {EPS:g}")
    return points, solution["rel_trace"], solution["result"][0]


def draw(path: Path) -> None:
    style = {"svg.hashsalt": "equilibrium", "font.size": 11, "text.color": INK}
    style |= {"axes.edgecolor": PALE, "axes.labelcolor": INK, "font.family": "DejaVu Sans"}
    with rc_context(style | {"xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(11, 3.9), facecolor="white")
        FigureCanvasSVG(figure)
        _loop(figure.add_axes((0.01, 0.03, 0.3, 0.94)))
        found = {name: solve(solver) for name, (solver, *_) in SOLVERS.items()}
        _iterates(figure.add_axes((0.375, 0.15, 0.265, 0.72)), found)
        _residuals(figure.add_axes((0.72, 0.15, 0.265, 0.72)), found)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _loop(axes) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.set_title("One layer, solved", fontsize=12, fontweight="bold", y=0.9)
    box = {"boxstyle": "round,pad=0,rounding_size=0.35", "lw": 1.6}
    axes.add_patch(FancyBboxPatch((3.8, 5.0), 2.6, 1.7, fc="#E8F1F8", ec="#0072B2", **box))
    axes.text(5.1, 5.85, "$f$", ha="center", va="center", fontsize=19)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 15, "lw": 1.6, "color": INK}
    axes.add_patch(FancyArrowPatch((1.7, 5.45), (3.75, 5.45), **arrow))
    axes.add_patch(FancyArrowPatch((6.45, 5.85), (8.6, 5.85), **arrow))
    axes.text(1.35, 5.45, "$x$", ha="center", va="center", fontsize=16)
    axes.text(9.15, 5.85, "$z^*$", ha="center", va="center", fontsize=16)
    loop = dict(arrow, color="#D55E00", connectionstyle="arc3,rad=0.0", arrowstyle="-")
    for begin, end in (((7.4, 5.85), (7.4, 7.75)), ((7.4, 7.75), (2.7, 7.75))):
        axes.add_patch(FancyArrowPatch(begin, end, shrinkA=0, shrinkB=0, **loop))
    axes.add_patch(
        FancyArrowPatch((2.7, 7.75), (3.78, 6.35), **dict(arrow, color="#D55E00"),
                        connectionstyle="angle,angleA=-90,angleB=180", shrinkA=0)
    )  # fmt: skip
    axes.text(5.05, 8.05, "$z$, until it stays", ha="center", color="#D55E00")
    axes.text(
        5.1, 3.45, "forward: a root solver\nfinds $z^* = f(z^*, x)$", ha="center", va="center"
    )
    axes.text(
        5.1, 1.35, "backward: one linear system at $z^*$,\nwhatever the solver did",
        ha="center", va="center",
    )  # fmt: skip


def _iterates(axes, found: dict) -> None:
    grid = torch.linspace(-1.05, 1.15, 60, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    height = (layer(z) - z).norm(dim=1).reshape(60, 60).T.log10()
    axes.contour(grid, grid, height, levels=12, colors="#cccccc", linestyles="-", linewidths=0.7)
    for name, (points, _, _) in found.items():
        _, colour, marker = SOLVERS[name]
        path = torch.stack(points[:SHOWN]).T
        axes.plot(*path, "-", marker=marker, color=colour, ms=4.5, lw=1.5)
    axes.plot(*found["Broyden"][2], "*", color=INK, ms=14, mec="white", zorder=5)
    axes.plot(-0.9, 0.9, "o", color=INK, ms=6, zorder=5)
    axes.annotate("start", (-0.9, 0.9), (7, 4), textcoords="offset points")
    axes.annotate("$z^*$", found["Broyden"][2], (26, 34), textcoords="offset points", fontsize=15)
    axes.set(xlabel="$z_1$", ylabel="$z_2$", xlim=(-1.05, 1.15), ylim=(-1.05, 1.15))
    axes.set(xticks=[], yticks=[])
    axes.set_title("The iterates of three solvers", fontsize=12, fontweight="bold")


def _residuals(axes, found: dict) -> None:
    for name, (_, trace, _) in found.items():
        _, colour, marker = SOLVERS[name]
        steps = range(1, len(trace) + 1)
        axes.semilogy(steps, trace, "-", marker=marker, markevery=4, color=colour, ms=4.5, lw=1.5)
        at = len(trace) - 1 if len(trace) < 50 else len(trace) // 3  # beside the end or the line
        axes.annotate(
            f"{name}: {len(trace)}", (at, trace[at]), (10, -4),
            textcoords="offset points", color=colour, fontweight="bold",
        )  # fmt: skip
    axes.set(xlabel="evaluations of $f$", ylabel="relative residual")
    axes.set_title("Evaluations until it stays", fontsize=12, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(Path(*sys.argv[1:2]) if sys.argv[1:] else FILE)
