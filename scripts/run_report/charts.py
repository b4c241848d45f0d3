"""The figures of a report; each has all runs in one pair of axes, and says what it shows."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from run_report.drawing import LEAST_OF_BAND, Chart, band, line, log_scale, look, window, with_zero
from run_report.reading import SCORES, TrainingRun
from run_report.saying import number, plural

_LONGEST = 32  # characters of a name in a legend: half of the figure's width
Part = tuple[str, str, dict]  # of a figure: kind of records, key, style
Series = tuple[list[int], list[float]]

_TRAIN, _VALID = {"alpha": 0.9}, {"marker": "o", "linewidth": 1.0}
_FORWARD, _BACKWARD = {}, {"linestyle": "--"}


def charts(runs: Sequence[TrainingRun]) -> list[Chart]:
    """The figures for which the runs have records."""
    found = [
        _losses(runs),
        *(_scores(runs, kind) for kind in SCORES),
        _residuals(runs, "forward"),
        _residuals(runs, "backward"),
        _evaluations(runs),
        _plain(runs, "jacobian", "Jacobian loss", "jac_loss", "the Jacobian loss, without weight"),
        _radii(runs),
        _speed(runs),
        _plain(runs, "memory", "Peak memory", "memory_mib", "the peak of memory so far", "MiB"),
        _plain(runs, "rate", "Learning rate", "lr", "the learning rate"),
        _troubles(runs),
    ]
    return [chart for chart in found if chart is not None]


def _chart(
    runs: Sequence[TrainingRun],
    key: str,
    title: str,
    what: str,
    label: str,
    lines: Callable[[TrainingRun], Iterable[tuple[str, Series, dict, bool]]],
    say: Callable[[TrainingRun], str],
    *,
    logarithmic: bool | None = None,  # None: if the values spread by a factor
    from_zero: bool = True,  # where the axis is not logarithmic
    level: tuple[float, str] | None = None,
    note: str = "",
) -> Chart | None:
    """A figure of the lines (name, series, style, as a band) of each run; None without any."""
    found = [(i, run, [part for part in lines(run) if part[1][0]]) for i, run in enumerate(runs)]
    found = [(i, run, parts) for i, run, parts in found if parts]
    if not found:
        return None

    def draw(axes):
        values = []
        for i, run, parts in found:
            for name, (steps, numbers), style, banded in parts:
                own = look(i) if len(runs) > 1 else look(_place(parts, name))
                alone = len(runs) > 1 and name != parts[0][0]  # one entry for each run
                named = {"label": "_" if alone else name if len(runs) == 1 else _shown(run.name)}
                (band if banded else line)(axes, steps, numbers, **own | named | style)
                values += numbers
            if run.border and run.last_step > run.border:
                colour = look(i)["color"] if len(runs) > 1 else "#8a8a8a"
                axes.axvline(run.border, color=colour, lw=0.9, ls=":")
        if level is not None:
            axes.axhline(level[0], color="#8a8a8a", lw=1, ls="--", label=level[1])
        axes.set_ylabel(label)
        if logarithmic:
            log_scale(axes, values, 1.0)
        elif logarithmic is None:
            log_scale(axes, values)
        elif from_zero:
            with_zero(axes)
        entries = len(axes.get_legend_handles_labels()[0])
        if len(runs) > 1:
            axes.figure.legend(loc="outside upper left", ncols=2)
        elif entries > 1:
            axes.legend()

    border = (
        " The dotted line marks the first step at equilibrium."
        if any(run.border and run.last_step > run.border for _, run, _ in found)
        else ""
    )
    said = "\n".join(f"{_prefix(runs, run)}{say(run)}" for _, run, _ in found)
    end = f"{note}{border}"
    end = end.replace(" ", "\n", 1) if len(found) > 1 else end  # each run has a line of its own
    of = f" of {plural(len(found), 'run')}" if len(runs) > 1 else ""
    return Chart(key, title, f"{what}{of}, over the steps", f"{said}{end}", draw)


def _place(parts, name: str) -> int:
    return [part[0] for part in parts].index(name)


def _shown(name: str) -> str:
    """The name of a run for a legend, which leaves out what begins with an underscore."""
    name = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
    return f" {name}" if name.startswith("_") else name


def _prefix(runs, run: TrainingRun) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _points(runs) -> str:
    """What tells the lines of a run from each other, as the legend names the runs alone."""
    return " Points: validation." if len(runs) > 1 else ""


def _losses(runs) -> Chart | None:
    def say(run):
        parts = []
        for kind, name in (("train", "training"), ("valid", "validation")):
            steps, values = run.series(kind, "loss")
            if steps:
                parts.append(
                    f"{name} loss from {number(values[0])} (step {steps[0]:,}) to "
                    f"{number(values[-1])} (step {steps[-1]:,})"
                )
        return f"{'; '.join(parts).capitalize()}."

    def lines(run):
        yield "training", run.series("train", "loss"), _TRAIN, False
        yield "validation", run.series("valid", "loss"), _VALID, False

    what = "Training and validation loss"
    return _chart(runs, "loss", "Loss", what, "loss", lines, say, note=_points(runs))


def _scores(runs, kind: str) -> Chart | None:
    score = SCORES[kind]
    factor = 100 if score.percent else 1

    def scaled(run, records, key):
        steps, values = run.scores(records, key)
        return steps, [factor * value for value in values]

    def lines(run):
        if run.kind == kind:
            yield "training", scaled(run, "train", score.train), _TRAIN, False
            yield "validation", scaled(run, "valid", score.valid), _VALID, False

    def say(run):
        if run.best is None:
            return "No validation yet."
        best = score.text(score.value(run.best, score.valid))
        steps, values = run.scores("valid", score.valid)
        return (
            f"Best {score.name} in validation {best} at step {run.best['step']:,}; the last of "
            f"{plural(len(steps), 'validation')} has {score.text(values[-1])}."
        )

    label = f"{score.name}, %" if score.percent else score.name
    title = score.name[0].upper() + score.name[1:]
    what = f"{title} in training and validation"
    key = f"score-{kind.replace(' ', '-')}"
    how = {"logarithmic": False, "from_zero": False} if score.percent else {}
    return _chart(runs, key, title, what, label, lines, say, note=_points(runs), **how)


def _residuals(runs, which: str) -> Chart | None:
    def values(run):
        mode = run.stop_mode if which == "forward" else "rel"
        return run.series("train", f"{which}_{mode}_residual")

    def lines(run):
        yield f"{which} solve", values(run), {}, True

    def say(run):
        found = values(run)[1]
        low, middle, high = np.percentile(found, (10, 50, 90))
        return (
            f"Median {number(middle)}, 10 to 90 % of the records from {number(low)} to "
            f"{number(high)}, last {number(found[-1])}."
        )

    modes = {run.stop_mode for run in runs}
    mode = {"abs": "absolute", "rel": "relative"}[modes.pop()] if len(modes) == 1 else ""
    label = f"{mode if which == 'forward' else 'relative'} residual".strip()
    tolerances = {run.tolerance for run in runs}
    level = None
    if which == "forward" and len(tolerances) == 1:
        level = (tolerances.pop(), "tolerance of the solver")
    sizes = [len(values(run)[0]) for run in runs if len(values(run)[0]) >= LEAST_OF_BAND]
    note = ""
    if sizes:
        sizes = sorted({window(size) for size in sizes})
        size = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        note = f" Line and band: median and 10 to 90 % of a moving window of {size} records."
    title = f"{which.capitalize()} residual"
    what = f"{title} of the training solves"
    key, more = f"{which}-residual", {"level": level, "note": note}
    return _chart(runs, key, title, what, label, lines, say, logarithmic=True, **more)


def _evaluations(runs) -> Chart | None:
    def lines(run):
        yield "forward", run.series("train", "forward_nfe"), _FORWARD, False
        yield "backward", run.series("train", "backward_nfe"), _BACKWARD, False
        steps, values = run.series("valid", "nfe")
        solved = [(s, v) for s, v in zip(steps, values, strict=True) if v]
        yield "validation", tuple(map(list, zip(*solved, strict=True))) or ([], []), _VALID, False

    def say(run):
        parts = []
        for name, (_, values), _, _ in lines(run):
            if values:
                parts.append(f"{name} {number(np.mean(values))} (last {number(values[-1])})")
        return f"Mean evaluations of f per solve: {', '.join(parts)}."

    what = "Evaluations of f per solve"
    label, note = (
        "evaluations per solve",
        _points(runs) and f"{_points(runs)[:-1]}; dashed: backward.",
    )
    how = {"logarithmic": False, "note": note}
    return _chart(runs, "evaluations", "Evaluations", what, label, lines, say, **how)


def _plain(runs, key: str, title: str, name: str, what: str, unit: str = "") -> Chart | None:
    """A figure of one entry of the training records."""

    def lines(run):
        yield title, run.series("train", name), {}, False

    def say(run):
        steps, values = run.series("train", name)
        of = f" {unit}" if unit else ""
        return f"First {number(values[0])}{of}, last {number(values[-1])}{of} (step {steps[-1]:,})."

    label = unit or title[0].lower() + title[1:] if not title.startswith("J") else title
    what = what[0].upper() + what[1:]
    return _chart(runs, key, title, what, label, lines, say, logarithmic=False)


def _radii(runs) -> Chart | None:
    def lines(run):
        yield "validation", run.series("valid", "sradius"), _VALID, False

    def say(run):
        steps, values = run.series("valid", "sradius")
        return (
            f"Mean spectral radius {values[-1]:.3f} at step {steps[-1]:,}; above 1, plain "
            "iteration does not settle."
        )

    what = "Spectral radius of df/dz at the equilibrium, in validation"
    title = "Spectral radius"
    return _chart(runs, "radius", title, what, "spectral radius", lines, say, logarithmic=False,
                  from_zero=False)  # fmt: skip


def _speed(runs) -> Chart | None:
    units = {"tokens" if run.kind in ("words", "characters", "state tracking") else "images"
             for run in runs}  # fmt: skip
    if len(units) == 1:
        unit = units.pop()

        def values(run):
            return run.series("train", f"{unit}_per_s")

        label = f"{unit} per second"
    else:  # tokens and images have no common scale

        def values(run):
            steps = sorted(run.step_times)
            return steps, [1000 / max(run.step_times[s], 1e-3) for s in steps]

        label = "steps per second"

    def lines(run):
        yield label, values(run), {}, False

    def say(run):
        found = values(run)[1]
        return f"Median {number(np.median(found))} {label}, last {number(found[-1])}."

    return _chart(runs, "speed", "Speed", "Training speed", label, lines, say, logarithmic=False)


def _troubles(runs) -> Chart | None:
    """How many steps were skipped and solves diverged up to each step; none if there are none."""

    def counted(run, kind) -> Series:
        steps = [record["step"] for record in run.of_kind(kind)]
        return steps, list(range(1, len(steps) + 1))

    def lines(run):
        yield "skipped steps", counted(run, "skipped"), {"marker": "x"}, False
        yield "diverged solves", counted(run, "diverged"), {"marker": ".", "linestyle": "--"}, False

    def say(run):
        skipped, solves = (len(run.of_kind(kind)) for kind in ("skipped", "diverged"))
        return f"{plural(skipped, 'skipped step')}, {plural(solves, 'diverged solve')}."

    title = "Skipped steps and diverged solves"
    what = "Skipped steps and diverged solves so far"
    return _chart(runs, "troubles", title, what, "number so far", lines, say, logarithmic=False)
