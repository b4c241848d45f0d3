"""Figures in words: numbers, the summary of a run, and the tables of several."""

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real

from lib.errors import is_number
from run_report.reading import TrainingRun, in_words

_ABSENT = object()


def number(value: float) -> str:
    """A number as people read it: three or four digits."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == 0 or 1e-2 <= size < 1e5:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summary(run: TrainingRun) -> list[str]:
    """Sentences on a run: how far, how good, how long, and whether its solves converged."""
    said = [f"A model of {run.kind} ({run.data}), {run.state}."]
    if not run.records:
        said.append("There is no record yet: records come with the first line of the log.")
        return said
    said += [*_scores(run), *_cost(run), *_solves(run)]
    skipped, diverged = (len(run.of_kind(kind)) for kind in ("skipped", "diverged"))
    said.append(
        "No step was skipped, and no solve diverged."
        if skipped + diverged == 0
        else f"{plural(skipped, 'step')} skipped, {plural(diverged, 'solve')} diverged."
    )
    radius, where = run.radius
    if where:
        settles = "below" if radius < 1 else "not below"
        said.append(f"The mean spectral radius of df/dz is {radius:.3f}, {settles} 1 ({where}).")
    if run.audit:
        said.append(f"The audit's verdict: {run.audit['verdict']}.")
    if run.damaged:
        said.append(
            f"{plural(run.damaged, 'line')} of metrics.jsonl could not be read (the last one may "
            "be in the making)."
        )
    return said


def _scores(run: TrainingRun) -> list[str]:
    score, best = run.score, run.best
    if best is None:
        steps, losses = run.series("train", "loss")
        last = f" The training loss is {number(losses[-1])} at step {steps[-1]:,}." if steps else ""
        return [f"No validation yet.{last}"]
    value = score.text(score.value(best, score.valid))
    said = [
        f"Best {score.name} in validation: {value}, at step {best['step']:,} ({best['phase']})."
    ]
    if final := run.final("test"):
        key = "loss" if run.kind in ("words", "characters") else score.valid
        found = score.value(final, key)
        if run.kind == "words":
            found = math.exp(min(found, 700))
        said.append(f"On test data: {score.text(found)}.")
    return said


def _cost(run: TrainingRun) -> list[str]:
    parts = []
    if math.isfinite(run.seconds):
        parts.append(f"{in_words(run.seconds)} of training steps (validations not counted)")
    if math.isfinite(run.memory):
        parts.append(f"a peak memory of {run.memory:,.0f} MiB")
    return [f"It took {' and '.join(parts)}."] if parts else []


def _solves(run: TrainingRun) -> list[str]:
    """Whether the last solves of training and validation reached the tolerance."""
    name = f"{run.stop_mode}_residual"
    steps, residuals = run.series("train", f"forward_{name}")
    evaluations = run.series("train", "forward_nfe")[1]
    where = "in training"
    if not steps:
        steps, residuals = run.series("valid", name)
        solved = [i for i, value in enumerate(residuals) if value > 0]
        if not solved:
            return ["All steps so far were stacked: nothing was solved yet."]
        steps, residuals = [steps[i] for i in solved], [residuals[i] for i in solved]
        evaluations = [v for v in run.series("valid", "nfe")[1] if v]
        where = "in validation"
    last, kind = residuals[-1], {"abs": "absolute", "rel": "relative"}[run.stop_mode]
    count = f" after {evaluations[-1]:.1f} evaluations" if evaluations else ""
    head = f"The last forward solves {where} (step {steps[-1]:,}) end at a mean {kind} residual of "
    head += f"{last:.1e}{count}: "
    if last <= run.tolerance:
        return [f"{head}they converged, to the tolerance of {run.tolerance:g}."]
    return [
        f"{head}above the tolerance of {run.tolerance:g}, so the limit of evaluations ended at "
        "least some of them."
    ]


def final_figures(runs: Sequence[TrainingRun]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Rows of a table: a name, and for each run a text and the value of the records; NaN: none."""
    rows = []

    def add(name: str, values: Sequence[float], text=number) -> None:
        if any(math.isfinite(value) for value in values):
            rows.append((name, [(text(v) if math.isfinite(v) else "–", v) for v in values]))

    add("last step", [float(run.last_step) if run.records else math.nan for run in runs],
        lambda v: f"{v:,.0f}")  # fmt: skip
    for score in dict.fromkeys(run.score for run in runs):
        key = score.valid
        own = [run if run.score is score else None for run in runs]
        values = [score.value(r.best or {}, key) if r else math.nan for r in own]
        add(f"best {score.name}, validation", values, score.text)
        add("… at step", [_of(r.best if r else None, "step") for r in own], lambda v: f"{v:,.0f}")
    # Of images, those of the best weights, which are the last of their kind.
    kinds = [r["kind"] for run in runs for r in run.records if r["kind"].startswith("final_")]
    for kind in dict.fromkeys(kinds):
        found = [run.final(kind.removeprefix("final_")) for run in runs]
        names = dict.fromkeys(chain.from_iterable(r or () for r in found))
        for name in names:
            if name not in ("kind", "step", "phase", "weights", "of_step", "length", "strings"):
                title = f"{kind.removeprefix('final_').replace('_', ' ')}: {_readable(name)}"
                add(title, [_of(record, name) for record in found])
    for name in ("loss", "forward_rel_residual", "forward_nfe", "backward_rel_residual",
                 "backward_nfe", "jac_loss", "tokens_per_s", "images_per_s"):  # fmt: skip
        last = [(run.series("train", name)[1] or [math.nan])[-1] for run in runs]
        add(f"last training record: {_readable(name)}", last)
    add("spectral radius", [run.radius[0] for run in runs])
    add("training time, seconds", [run.seconds for run in runs])
    add("peak memory, MiB", [run.memory for run in runs])
    for kind, name in (("skipped", "skipped steps"), ("diverged", "diverged solves")):
        add(name, [float(len(run.of_kind(kind))) for run in runs])
    return rows


def _of(record, name: str) -> float:
    found = record.get(name) if isinstance(record, dict) else None
    return float(found) if is_number(found) else math.nan


def _readable(name: str) -> str:
    short = {"nfe": "evaluations", "rel_residual": "relative residual", "top1": "accuracy",
             "abs_residual": "absolute residual", "top5": "accuracy (one of the first 5)",
             "exact": "all answers right", "jac_loss": "Jacobian loss",
             "sradius": "spectral radius"}  # fmt: skip
    for which in ("forward_", "backward_"):
        if name.startswith(which):
            return f"{which[:-1]} {_readable(name.removeprefix(which))}"
    return short.get(name, name.replace("_per_s", " per second").replace("_", " "))


def differing_settings(runs: Sequence[TrainingRun]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: a name, and the value of each run."""
    names = dict.fromkeys(chain.from_iterable(run.settings for run in runs))
    rows = []
    for name in names:
        values = [run.settings.get(name, _ABSENT) for run in runs]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values):
            rows.append((name, [as_text(value) for value in values]))
    return rows


def as_text(value) -> str:
    """A setting as people write it."""
    if value is _ABSENT:
        return "–"
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "none"
    return str(value) if value not in ("", None) else "none"
