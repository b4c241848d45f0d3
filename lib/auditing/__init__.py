r"""Is this model an equilibrium? An audit of any model that holds a :class:`~lib.deq.DEQ`.

A low loss does not show that a model uses its fixed point: the answer may be read from the start,
the iteration may never settle, or another start may lead to another answer. The audit calls the
model with its solves skipped, cut, lengthened and started elsewhere, and gives five findings

1. the measure when the solver is skipped or ends earlier or later (the solve that need not be
   made: arXiv 2607.11116);
2. the points that other starts lead to: path independence (Anil et al. 2022, arXiv 2211.09961);
3. whether the residual of a sample tells that its answer is wrong;
4. whether harder samples take more evaluations;
5. the spectral radius of df/dz at the solution

and a verdict, by the rules of :func:`~lib.auditing.findings.judge`.

Example (a contraction, whose state answers whether a number is positive)::

    >>> import torch
    >>> from lib import DEQ, audit
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.deq = DEQ()
    ...     def forward(self, x):
    ...         return self.deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x)).z
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> report = audit(Model(), [(x, x > 0)], lambda z, positive: ((z > 0) == positive)[:, 0])
    >>> report.verdict
    'equilibrium'
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.auditing.findings import ADVICE, OWN, Audit, Rules, correctness, effort, enough, judge
from lib.auditing.probe import Probe, Request, Solution, probing
from lib.deq import DEQ
from lib.errors import InputError, check, check_count, check_number
from lib.solvers.norms import relative

__all__ = ["ADVICE", "OWN", "Audit", "Rules", "audit"]

RADIUS_PRODUCTS = 100


def audit(
    model: nn.Module | DEQ,
    batches: Iterable[tuple[Any, Any]],
    correct: Callable[[Any, Any], Tensor],
    *,
    difficulty: Callable[[Any, Any], Tensor] | None = None,
    forward: Callable[[Any], Any] | None = None,
    measure: str = "accuracy",
    eps: float | None = None,
    scales: Sequence[float] = (0.1, 1.0, 10.0),
    seeds: Sequence[int] = (0,),
    rules: Rules | None = None,
) -> Audit:
    """Find out whether the answers of a model are those of a fixed point.

    The model is called about 20 times per batch, in evaluation mode and without autograd. A batch
    that settles in k evaluations of f, with a threshold t, costs about 15 k + 6 t + 200
    evaluations; one that never settles, about 40 t. What the model draws at random is the same at
    each call. ``unroll`` and ``reversible`` count as plain iteration, with their damping.

    Args:
        model: a module with DEQs among the attributes of its parts; or a DEQ, with ``forward``.
        batches: pairs (inputs, target), as a DataLoader gives them. Every state of the model has
            one row per sample.
        correct: (output, target) -> score of each sample, (B,): right or wrong (True, False), or a
            number, higher if the answer is better.
        difficulty: (output, target) -> difficulty of each sample, (B,), such as a length.
        forward: inputs -> output; by default ``model(inputs)``.
        measure: the name of the mean score, for the report.
        eps: the residual at which a sample is settled, in the ``stop_mode`` of the DEQ; by default
            the tolerance of its solver, or 1e-3 if that has none.
        scales, seeds: of other starts: noise of each scale, in units of the rms of the solution.
        rules: the thresholds.

    Raises:
        InputError: the model has no DEQ, there is no batch, or there is not one score and one row
            of the state per sample.
    """
    if eps is not None:
        check_number("eps", eps, positive=True)
    for scale in scales:
        check_number("a number in scales", scale, positive=True)
    for seed in seeds:
        check_count("a number in seeds", seed, 0)
    check(len(scales) > 0 and len(seeds) > 0, "scales and seeds", (scales, seeds), "not empty")
    rules = rules or Rules()
    starts = list(itertools.product(("displaced", "drawn"), scales, seeds))
    parts: list[dict[Any, _Pass]] = []
    with probing(model, eps) as probe:
        for batch in batches:
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            check(pair, "a batch", type(batch).__name__, "a pair (inputs, target)")
            run = partial(_run, probe, forward or model, *batch, correct, difficulty)
            parts.append(_passes(run, probe, starts, rules))
    if not parts:
        raise InputError("batches is empty: an audit needs samples")
    return _report(parts, starts, measure, rules)


class _Pass:
    """The figures of each sample from one pass, (N,) each; of several solves the worst counts."""

    def __init__(self, score: np.ndarray, hard: np.ndarray | None, found: list[Solution], around):
        rows = {len(s.settled) for s in found} - {len(score)}
        if rows:
            raise InputError(
                f"a state has {rows.pop()} rows, but there are {len(score)} scores: audit needs "
                "one of each per sample"
            )
        self.score, self.hard = score, hard
        self.norms = np.stack([s.norms for s in found])  # (solves, 2, N)
        self.residual = relative(self.norms[:, 0], self.norms[:, 1]).max(axis=0)
        self.settled = np.stack([s.settled for s in found]).all(axis=0)
        self.evaluations = np.stack([s.evaluations for s in found]).sum(axis=0)
        self.radius = np.stack([s.radius for s in found]).max(axis=0)
        self.met, self.counted = all(s.met for s in found), all(s.counted for s in found)
        self.threshold, self.eps = max(s.threshold for s in found), max(s.eps for s in found)
        # Without other starts ``around`` is empty, and there is no distance.
        states = zip(found, around, strict=False)
        pairs = [[s.z.flatten(1).double().cpu().numpy() for s in pair] for pair in states]
        away = [relative(*(np.linalg.norm(v, axis=1) for v in (a - b, b))) for a, b in pairs]
        self.distance = np.max(away, axis=0) if away else np.zeros(len(score))


def _run(probe: Probe, call, inputs, target, correct, difficulty, request: Request) -> _Pass:
    """Call the model on one batch as a request says."""
    probe.request, probe.found = request, []
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of what the model draws at random, such as a start
        output = call(inputs)
    if not probe.found:
        raise InputError("the model called no DEQ: audit finds nothing to look at")
    score = _row(correct(output, target), "correct")
    hard = None if difficulty is None else _row(difficulty(output, target), "difficulty")
    return _Pass(score, hard, probe.found, request.around)


def _row(values: Tensor, name: str) -> np.ndarray:
    """Numbers of the samples as (N,) float64."""
    fits = isinstance(values, Tensor) and values.ndim == 1
    what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    check(fits, f"what {name} returns", what, "a tensor of one number per sample, (B,)")
    return values.detach().double().cpu().numpy()


def _cuts(threshold: int) -> list[int]:
    """2, 4, 8, ... below the threshold; with one evaluation a solver returns its start."""
    return [2**i for i in range(1, threshold.bit_length()) if 2**i < threshold]


def _passes(run: Callable, probe: Probe, starts: list, rules: Rules) -> dict[Any, _Pass]:
    """All passes over one batch, by the names of cuts and by starts."""
    own = run(Request())
    patient = Request(times=rules.longer[-1], least=rules.least, eps=1.0)
    tight = replace(patient, eps=rules.tighter)
    found = {
        OWN: own,
        "skipped": run(Request(evaluations=0)),
        **{str(n): run(Request(evaluations=n)) for n in _cuts(own.threshold)},
        **{f"{n} x threshold": run(Request(times=n, eps=0.0)) for n in rules.longer},
        "patient": run(patient),
        "reference": run(replace(tight, products=RADIUS_PRODUCTS)),
    }
    around = tuple(probe.found)
    return found | {s: run(replace(tight, start=s, around=around)) for s in starts}


def _report(parts: list[dict[Any, _Pass]], starts: list, measure: str, rules: Rules) -> Audit:
    """Put the batches together."""

    def of(name: Any, figure: str) -> np.ndarray:
        # A batch with a lower threshold has fewer cuts: there it counts as it ended.
        return np.concatenate([getattr(part.get(name, part[OWN]), figure) for part in parts])

    def at(name: str) -> dict:
        norms = [np.concatenate(list(p.get(name, p[OWN]).norms), axis=1) for p in parts]
        g, f = np.linalg.norm(np.concatenate(norms, axis=1), axis=1)
        return {
            "name": name,
            "evaluations": float(of(name, "evaluations").mean()),
            "measure": float(of(name, "score").mean()),
            "residual": float(relative(g, f)),
            "settled": float(of(name, "settled").mean()),
            "met": all(part.get(name, part[OWN]).met for part in parts),
        }

    def started(start: tuple[str, float, int]) -> dict:
        away = of(start, "distance")
        settled = of(start, "settled") & of("reference", "settled")
        return {
            **dict(zip(("kind", "scale", "seed"), start, strict=True)),
            "settled": float(settled.mean()),
            "distance": float(np.median(away)),
            "elsewhere": float((settled & (away > rules.same_point)).mean()),
            "change": float((of(start, "score") - of("reference", "score")).mean()),
        }

    threshold = max(part[OWN].threshold for part in parts)
    names = ["skipped", *map(str, _cuts(threshold)), OWN]
    names += [f"{n} x threshold" for n in rules.longer]
    scores = {name: of(name, "score") for name in names}
    cuts, others = [at(name) for name in names], [started(start) for start in starts]
    radii = of("reference", "radius")[of("reference", "settled")]
    radius: dict[str, Any] = dict.fromkeys(("mean", "largest", "below_one")) | {
        "samples": len(radii)
    }
    if len(radii):
        figures = radii.mean(), radii.max(), (radii < 1).mean()
        radius |= dict(zip(radius, map(float, figures), strict=False))
    patient = float(of("patient", "settled").mean())
    spent = of("patient", "evaluations")
    counted = all(part["patient"].counted for part in parts)
    hard = None if parts[0][OWN].hard is None else of(OWN, "hard")
    verdict, reason = judge(scores, cuts, others, radius, patient, rules)
    return Audit(
        verdict=verdict,
        reason=reason,
        measure=measure,
        samples=len(scores[OWN]),
        threshold=threshold,
        eps=max(part[OWN].eps for part in parts),
        budget=max(rules.longer[-1] * threshold, rules.least),
        patient=patient,
        enough=enough(scores, rules.tolerance),
        cuts=cuts,
        starts=others,
        correctness=correctness(of(OWN, "residual"), scores[OWN], rules),
        effort=effort(spent if counted else None, hard, of("patient", "settled"), rules),
        radius=radius,
        rules=rules,
    )
