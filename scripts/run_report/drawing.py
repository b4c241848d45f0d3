"""Drawing: axes over the steps, lines, bands, and figures as SVG for both themes or as PNG."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lib.errors import needs

with needs("runs"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Of middle lightness: they can be told apart on a light and on a dark ground.
COLOURS = ("#3f87d9", "#dd7a1f", "#2f9e6e", "#b065c9", "#d6496b", "#8a8d2c", "#17a0b4", "#9a7355")
STYLES = ("-", "--", ":", "-.")  # after the last colour
MOST_POINTS = 240  # of a line; more are drawn as means over windows
LEAST_OF_BAND = 10  # fewer values are drawn one by one
_WINDOW = 5  # values, at least, and at least this part of all:
_PART = 20
_MARGIN = 0.08  # of the height, above the largest value
_INK = "#010203"  # stands for the colour of the page's text
_SIZE = 4.4, 2.8  # inches: as wide as a phone
_ROWS, _ROW = 3, 0.18  # of names above the axes: how many have room, and inches for each more
_STYLE = {
    "svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif",
    "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#8a8a8a",
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.35, "grid.color": "#8a8a8a",
    "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.5, "lines.markersize": 4, "text.parse_math": False,
}  # fmt: skip
_THEMES = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#dcdcdc}}</style>"


@dataclass(frozen=True)
class Chart:
    """A figure: what is drawn, and what is said of it.

    Attributes:
        key, title: the name of its files; what stands above it.
        alt: a line on what is drawn; ``caption``: the same with the figures that matter.
        draw: draws on the axes that it is given.
    """

    key: str
    title: str
    alt: str
    caption: str
    draw: Callable[[Axes], object]

    def svg(self) -> str:
        """An SVG whose text has the colour of the theme, as a data address."""
        with rc_context(_STYLE):
            figure = self._figure()
            FigureCanvasSVG(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", text, flags=re.S)
        text = re.sub(r"(<svg [^>]*>)", rf"\1{_THEMES}", text, count=1)
        text = re.sub(r">\s+<", "><", text.replace(_INK, "currentColor"))
        return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"

    def png(self) -> bytes:
        """A PNG on a white ground, with the title."""
        with rc_context(_STYLE | {"savefig.facecolor": "white"}):
            figure = self._figure()
            FigureCanvasAgg(figure)
            figure.axes[0].set_title(self.title)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=150)
        return file.getvalue()

    def _figure(self) -> Figure:
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        self.draw(axes)
        axes.set_xlabel("step")
        names = sum(len(legend.get_texts()) for legend in figure.legends)
        figure.set_figheight(_SIZE[1] + _ROW * max(-(-names // 2) - _ROWS, 0))
        return figure


def look(index: int) -> dict:
    """Colour and line style of a run."""
    style = STYLES[index // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style}


def line(axes: Axes, steps: Sequence[int], values: Sequence[float], **style) -> None:
    """Draw a line; with many points, of means over windows of equal numbers of them."""
    if len(steps) > MOST_POINTS:
        edges = np.linspace(0, len(steps), MOST_POINTS + 1).round().astype(int)
        steps = [steps[b - 1] for b in edges[1:]]
        values = [np.mean(values[a:b]) for a, b in pairwise(edges)]
    marker = {"marker": "o"} if len(steps) < 3 else {}
    axes.plot(steps, values, **marker | style)


def window(count: int) -> int:
    """The number of values in a moving window over ``count`` of them."""
    return max(_WINDOW, count // _PART)


def band(axes: Axes, steps: Sequence[int], values: Sequence[float], **style) -> None:
    """Draw the median of a moving window, and the band from its 10th to its 90th percentile."""
    if len(steps) < LEAST_OF_BAND:
        line(axes, steps, values, **style)
        return
    size = window(len(steps))
    centres = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
    starts = (centres - size // 2).clip(0, len(steps) - size)
    found = np.array([np.percentile(values[a : a + size], (10, 50, 90)) for a in starts])
    at, (low, middle, high) = np.asarray(steps)[centres], found.T
    axes.plot(at, middle, **style)
    axes.fill_between(at, low, high, color=style.get("color"), alpha=0.25, linewidth=0)


def with_zero(axes: Axes) -> None:
    """Let the y axis begin at zero, and end above all that is drawn.

    The margin that matplotlib leaves is a part of the spread of the values: next to nothing, if
    they are far from zero and close to each other.
    """
    axes.set_ylim(0, (1 + _MARGIN) * max(axes.dataLim.y1, 0) or 1)


def log_scale(axes: Axes, values: Sequence[float], least: float = 8.0) -> None:
    """Take a logarithmic axis if all values are positive and they spread by a factor.

    Its numbers are plain: typeset powers of ten are slow to draw, and harder to read.
    """
    if not values or min(values) <= 0 or max(values) / min(values) < least:
        return
    axes.set_yscale("log")
    spread = max(values) / min(values)
    axis = axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1,) if spread > 100 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
