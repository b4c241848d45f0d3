"""The figures of an audit, its rules and its verdict."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

OWN = "own threshold"  # the cut at which the model is used
_UNKNOWN = dict.fromkeys(("correlation", "auc", "low", "high"))

ADVICE = {  # what to do about each verdict
    "equilibrium": "any start and solver will do, and more evaluations do no harm",
    "unstable equilibrium": "plain iteration leaves the point: keep the solver, or add the "
    "Jacobian loss",
    "local equilibrium": "name the start with the model, or train from random starts",
    "several fixed points": "name the start with the model, or train from random starts",
    "cut short": "raise f_thres, take another f_solver, or state the residual with the model",
    "no fixed point": "trust neither the residual nor an implicit gradient; train with grad "
    "phantom, more evaluations or the Jacobian loss",
    "truncated iteration": "call it a network of that depth; or train with thresholds drawn at "
    "random, grad phantom or the Jacobian loss",
    "idle solver": "drop the solve, or find out why training did not use it",
    "undecided": "give more samples",
}


@dataclass(frozen=True)
class Rules:
    """All thresholds of an audit."""

    longer: tuple[int, ...] = (2, 4)  # times the threshold, in finding 1; the last: to settle
    least: int = 100  # evaluations to settle in any case
    tighter: float = 0.1  # times the tolerance, where points are compared
    samples: int = 20  # fewer give no verdict
    each: int = 5  # fewer right or wrong ones say nothing about the residual
    share: float = 0.95  # of samples or solves for which a property has to hold
    tolerance: float = 0.01  # of the measure: one answer in 100, or 1 % of a perplexity
    same_point: float = 0.1  # distance relative to the norm: a cosine of 0.995


@dataclass(frozen=True)
class Audit:
    """The result of :func:`lib.audit`; ``print`` it for a table.

    Attributes:
        verdict, reason: see :func:`judge`.
        measure, samples, threshold, eps: the measure's name; the number of samples; the model's
            largest threshold and tolerance. A sample with a residual below ``eps`` has settled.
        budget, patient: the evaluations that a sample may take to settle, and the share that does.
        enough: the cut from which on the measure is the same as at the model's own threshold.
        cuts: finding 1, a dict for each cut: name, evaluations (mean), measure, residual (relative,
            over all samples), settled (share), met (residual of each batch below eps).
        starts: finding 2, a dict for each start: kind, scale, seed, settled (share), distance (to
            the point from the model's own start, relative, median), elsewhere (share that settles
            more than ``rules.same_point`` away), change (of the measure).
        correctness, effort: findings 3 and 4: said (in words), correlation (rank), auc (the
            probability that a wrong sample has a larger residual than a right one), low and high
            (the mean residual if right and if wrong; the mean evaluations of the easier and the
            harder half). None: not known.
        radius: finding 5, of the samples that settled: samples, mean, largest, below_one (share).
    """

    verdict: str
    reason: str
    measure: str
    samples: int
    threshold: int
    eps: float
    budget: int
    patient: float
    enough: str
    cuts: list[dict]
    starts: list[dict]
    correctness: dict
    effort: dict
    radius: dict
    rules: Rules

    def as_dict(self) -> dict:
        """All figures, for JSON; a figure that is not finite is None."""
        return _finite({**asdict(self), "advice": ADVICE[self.verdict]})

    def __str__(self) -> str:
        cuts = [("", "evaluations", self.measure, "residual", "settled")] + [
            (c["name"], f"{c['evaluations']:.1f}", f"{c['measure']:.3f}", f"{c['residual']:.1e}",
             f"{c['settled']:.0%}")
            for c in self.cuts
        ]  # fmt: skip
        starts = [("start", "settled", "distance", "elsewhere", "change")] + [
            ("{kind}, scale {scale:g}, seed {seed}".format(**s), f"{s['settled']:.0%}",
             f"{s['distance']:.1e}", f"{s['elsewhere']:.0%}", f"{s['change']:+.3f}")
            for s in self.starts
        ]  # fmt: skip
        radius = "no sample settled"
        if self.radius["samples"]:
            radius = (
                "mean {mean:.3f}, largest {largest:.3f}, below 1 for {below_one:.0%} of the "
                "{samples} samples that settled"
            ).format(**self.radius)
        return "\n".join(
            [
                f"verdict: {self.verdict}",
                f"  {self.reason}",
                f"  advice: {ADVICE[self.verdict]}",
                f"  {self.samples} samples, threshold {self.threshold}, tolerance {self.eps:g}",
                f"1. the measure when the solve ends earlier or later (there from: {self.enough})",
                *_columns(cuts),
                f"2. other starts, up to {self.budget} evaluations",
                *_columns(starts),
                f"3. residual and correctness: {self.correctness['said']}",
                f"4. evaluations and difficulty: {self.effort['said']}",
                f"5. spectral radius of df/dz: {radius}",
            ]
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"  {row[0]:<{first}}"
        + "".join(f"{v:>{w + 2}}" for v, w in zip(row[1:], rest, strict=True))
        for row in rows
    ]


def compare(before: np.ndarray, after: np.ndarray, tolerance: float) -> str:
    """'same' if paired means differ by at most the tolerance; 'higher' or 'lower' if by more, and
    by two standard errors of the differences; else 'unclear'."""
    change = after - before
    mean = float(change.mean())
    if abs(mean) <= tolerance:
        return "same"
    if len(change) < 2 or abs(mean) <= 2 * change.std(ddof=1) / math.sqrt(len(change)):
        return "unclear"
    return "higher" if mean > 0 else "lower"


def enough(scores: dict[str, np.ndarray], tolerance: float) -> str:
    """The first cut from which on the measure is the same as at the model's own threshold."""
    names = list(scores)
    first = names.index(OWN)
    while first and compare(scores[OWN], scores[names[first - 1]], tolerance) == "same":
        first -= 1
    return names[first]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[index.reshape(-1)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if one of them is constant."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else None


def _told(value: float | None, error: float, less: str, more: str) -> str:
    """``less`` or ``more``, by the sign of a value more than two standard errors from 0."""
    value = value or 0
    return "no relation" if abs(value) <= 2 * error else more if value > 0 else less


def correctness(residual: np.ndarray, score: np.ndarray, rules: Rules) -> dict:
    """Finding 3, from the relative residual and the score of each sample (N,)."""
    n, rank = len(score), rank_correlation(residual, score)
    right, wrong = residual[score == 1], residual[score == 0]
    found = _UNKNOWN | {"correlation": rank}
    if len(right) + len(wrong) < n:  # the score is not right or wrong
        less, more = (f"a {s} residual goes with a higher score" for s in ("smaller", "larger"))
        said = f"{_told(rank, 1 / math.sqrt(n), less, more)} (rank correlation {rank or 0:.2f})"
        return found | {"said": said if n >= rules.samples else f"cannot be told from {n} samples"}
    found |= {k: float(v.mean()) for k, v in {"low": right, "high": wrong}.items() if len(v)}
    if min(len(right), len(wrong)) < rules.each:
        said = f"cannot be told: {len(right)} of {n} samples are right, {len(wrong)} wrong"
        return found | {"said": said}
    above = ranks(np.concatenate([right, wrong]))[len(right) :].mean() - (len(wrong) + 1) / 2
    auc = float(above / len(right))  # Mann and Whitney's statistic
    error = math.sqrt((n + 1) / (12 * len(right) * len(wrong)))
    less, more = (f"{kind} samples have the larger residual" for kind in ("right", "wrong"))
    means = "mean {low:.1e} if right, {high:.1e} if wrong".format(**found)
    said = f"{_told(auc - 0.5, error, less, more)} (AUC {auc:.2f}; {means})"
    return found | {"auc": auc, "said": said}


def effort(
    evaluations: np.ndarray | None, hard: np.ndarray | None, settled: np.ndarray, rules: Rules
) -> dict:
    """Finding 4, from the samples that settled: another spends its budget, easy or hard."""
    if hard is None:
        return _UNKNOWN | {"said": "unknown: no difficulty is given"}
    if evaluations is None:
        return _UNKNOWN | {"said": "unknown: the solver does not count evaluations per sample"}
    if settled.mean() < rules.share:
        return _UNKNOWN | {"said": f"cannot be told: {settled.mean():.0%} of the samples settle"}
    evaluations, hard = evaluations[settled], hard[settled]
    n, rank = len(hard), rank_correlation(evaluations, hard)
    if n < rules.samples or rank is None:
        why = f"{n} samples" if n < rules.samples else "figures that are all the same"
        return _UNKNOWN | {"said": f"cannot be told from {why}"}
    upper = hard > np.median(hard)
    low, high = (float(evaluations[part].mean()) for part in (~upper, upper))
    less, more = (f"harder samples take {what}" for what in ("fewer", "more"))
    said = _told(rank, 1 / math.sqrt(n), less, more)
    said += f" (rank correlation {rank:.2f}; {low:.1f} if easier, {high:.1f} if harder)"
    return _UNKNOWN | {"correlation": rank, "low": low, "high": high, "said": said}


def judge(
    scores: dict[str, np.ndarray],
    cuts: list[dict],
    starts: list[dict],
    radius: dict,
    patient: float,
    rules: Rules,
) -> tuple[str, str]:
    """The verdict and its reason. The first of these rules that holds decides:

    1. undecided: fewer than ``rules.samples``, or the gain of the solve may be chance;
    2. idle solver: the measure is there when the solver is skipped;
    3. truncated iteration: the measure falls when the solve goes on; or it rises, and fewer than
       ``rules.share`` of the samples settle;
    4. no fixed point: fewer than ``rules.share`` of the samples settle;
    5. cut short: they do, but not within the model's threshold;
    6. several fixed points: more than 1 - ``rules.share`` of the solves from other starts settle
       elsewhere;
    7. local equilibrium: fewer than ``rules.share`` of them come back;
    8. unstable equilibrium: the spectral radius is below 1 for fewer than ``rules.share``;
    9. equilibrium: none of these.
    """
    own, last = next(c for c in cuts if c["name"] == OWN), cuts[-1]
    n = len(scores[OWN])
    gain = compare(scores[cuts[0]["name"]], scores[OWN], rules.tolerance)
    both = f"the measure is {own['measure']:.3f}, and {cuts[0]['measure']:.3f} without a solve"
    if n < rules.samples or gain == "unclear":
        return "undecided", f"{n} samples; {both}"
    if gain != "higher":
        return "idle solver", both
    longer = compare(scores[OWN], scores[last["name"]], rules.tolerance)
    settle = (
        f"{patient:.0%} of the samples settle; the measure is {own['measure']:.3f} at the "
        f"threshold, {last['measure']:.3f} at {last['name']}"
    )
    if longer == "lower" or (longer == "higher" and patient < rules.share):
        return "truncated iteration", settle
    if patient < rules.share:
        return "no fixed point", f"{settle}; the residual stays at {last['residual']:.1e}"
    if own["settled"] < rules.share and not own["met"]:
        return "cut short", f"the residual is {own['residual']:.1e} at the threshold; {settle}"
    elsewhere = float(np.mean([s["elsewhere"] for s in starts]))
    back = float(np.mean([s["settled"] for s in starts])) - elsewhere
    largest = max((s["change"] for s in starts), key=abs)
    returns = (
        f"of the solves from other starts {back:.0%} come back and {elsewhere:.0%} settle "
        f"elsewhere; the measure changes by up to {largest:+.3f}"
    )
    if elsewhere > 1 - rules.share:
        return "several fixed points", returns
    if back < rules.share:
        return "local equilibrium", returns
    radii = f"the spectral radius is at most {radius['largest']:.3f}"
    if radius["below_one"] < rules.share:
        return "unstable equilibrium", f"{radii}, and below 1 for {radius['below_one']:.0%}"
    return "equilibrium", f"{patient:.0%} of the samples settle; {returns}; {radii}"
