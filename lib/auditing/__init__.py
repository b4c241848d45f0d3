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

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.auditing.findings import ADVICE, OWN, Audit, Rules, correctness, effort, enough, judge
from lib.deq import DEQ
from lib.errors import DEQWarning, InputError, check, check_count, check_number
from lib.gradients import Gradient, Solved
from lib.gradients.attachment import recording_for
from lib.gradients.iterations import Iteration
from lib.jacobian import power_method
from lib.solvers import SOLVERS, fixed_point_iteration
from lib.solvers.arguments import unwrapped
from lib.solvers.norms import relative
from lib.solvers.stats import SolverStats, solve_figures

__all__ = ["ADVICE", "OWN", "Audit", "Rules", "audit"]

RADIUS_PRODUCTS = 100
EPS = 1e-3  # tolerance of a solver that has none


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
    evaluations; one that never settles, about 40 t. Random draws are the same at each call.
    ``unroll`` and ``reversible`` count as plain iteration, with their damping.

    Args:
        model: a module with DEQs among the attributes of its parts; or a DEQ, with ``forward``.
        batches: pairs (inputs, target), as of a DataLoader. Every state of the model has one row
            per sample.
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
        InputError: no DEQ, no batch, or not one score and one row of the state per sample.
    """
    if eps is not None:
        check_number("eps", eps, positive=True)
    for scale in scales:
        check_number("a number in scales", scale, positive=True)
    for seed in seeds:
        check_count("a number in seeds", seed, 0)
    check(len(scales) > 0 and len(seeds) > 0, "scales and seeds", (scales, seeds), "not empty")
    rules, starts = rules or Rules(), list(product(("displaced", "drawn"), scales, seeds))
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


@dataclass(frozen=True)
class Request:
    """How the solves of one forward pass differ from the model's own; by default not at all."""

    evaluations: int | None = None  # at most so many, with products; 0: the head gets the start
    times: int = 1  # the threshold is the model's own so many times,
    least: int = 0  # and at least this
    eps: float | None = None  # times the tolerance: each sample stops by itself; 0: do not stop
    # (kind, scale, seed): noise of scale * rms(z) * N(0, 1), alone ('drawn') or added to z, the
    # solution of the same solve in ``around`` ('displaced').
    start: tuple[str, float, int] | None = None
    around: tuple["Solution", ...] = ()
    products: int = 0  # with the Jacobian, for the spectral radius at the solution


@dataclass
class Solution:
    """One solve; figures are on the host."""

    z: Tensor  # the state (B, ...), judged by an evaluation of f
    norms: np.ndarray  # ||f(z) - z|| and ||f(z)|| of each sample, (2, B)
    settled: np.ndarray  # residual below the tolerance, (B,)
    met: bool  # the same over the whole batch, as a solver may stop by it
    evaluations: np.ndarray  # (B,)
    counted: bool  # are they those of each sample by itself
    threshold: int  # the model's own, as is eps
    eps: float
    radius: np.ndarray  # (B,), zeros if not asked for


class Probe:
    """Solves as ``request`` says; ``found`` holds a :class:`Solution` for each solve."""

    def __init__(self, eps: float | None):
        self.request, self.eps = Request(), eps
        self.found: list[Solution] = []

    def solve(
        self, own: Callable, f: Callable, z0: Tensor, threshold: int, stop_mode: str = "rel"
    ) -> dict:
        """What a DEQ calls in place of its solver ``own``."""
        request = self.request
        function, options = unwrapped(own)
        ours = function in SOLVERS.values()
        tolerance = options.get("eps", signature(function).parameters["eps"].default if ours else 0)
        eps = self.eps or tolerance or EPS
        if request.start is not None:
            z0 = self._start(z0, *request.start)
        if request.evaluations == 0:
            solution = {"result": z0.clone(), "nfe": 0}
        else:
            solver = _changed(own, ours, request, threshold, eps)
            solution = solver(f, z0, stop_mode=stop_mode)
        z = solution["result"]
        fz = f(z)
        parts = [torch.linalg.vector_norm(v.flatten(1).double(), dim=1) for v in (fz - z, fz)]
        norms = torch.stack(parts).cpu().numpy()
        both = np.column_stack([norms, np.linalg.norm(norms, axis=1)])  # the last: of the batch
        below = (both[0] if stop_mode == "abs" else relative(*both)) < eps
        spent, radius = np.full(len(z), float(solve_figures(solution)["nfe"])), np.zeros(len(z))
        if counted := bool(ours and request.eps):
            spent = solution["sample_nfe"].double().cpu().numpy()
        if request.products:
            with recording_for("the spectral radius"):
                point = z.clone().requires_grad_()
                found = power_method(f(point), point, n_iters=request.products)[1]
                radius = found.detach().double().cpu().numpy()[:, 0]
        self.found.append(
            Solution(z, norms, below[:-1], bool(below[-1]), spent, counted, threshold, eps, radius)
        )
        return solution

    def _start(self, z0: Tensor, kind: str, scale: float, seed: int) -> Tensor:
        around = self.request.around[len(self.found) :]
        if not around or around[0].z.shape != z0.shape:
            raise InputError(
                "the model's solves differ between two calls with the same inputs: audit needs "
                "the same number of them, with states of the same shape"
            )
        z, generator = around[0].z, torch.Generator().manual_seed(seed)
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        rms = z.flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (z.ndim - 1))
        return scale * rms * noise + (z if kind == "displaced" else 0)


def _changed(own: Callable, ours: bool, request: Request, threshold: int, eps: float) -> Callable:
    """A solver with the budget and the tolerance of a request."""
    granted = max(request.times * threshold, request.least)
    if request.evaluations is not None:
        granted = min(granted, request.evaluations)
    if not ours:  # a user's own: it has a threshold, and no more is known of it
        return partial(own, threshold=granted)
    function, options = unwrapped(own)
    options = dict(options) | {"threshold": max(granted, threshold)}
    if request.evaluations is not None:
        options["max_nfe"] = min(granted, options.get("max_nfe") or granted)
    elif granted > threshold:
        options.pop("max_nfe", None)
    if request.eps is not None:
        options["eps"] = request.eps * eps
    if request.eps:
        options = {k: v for k, v in options.items() if k not in ("best", "check_every")}
        options["stop"] = "sample"
    return partial(function, **options)


@dataclass(frozen=True)
class _Outlet(Gradient):
    """The model's own gradient; but a start goes to the head as it is."""

    own: Gradient | Iteration
    probe: Probe

    def attach(self, solved: Solved) -> Tensor:
        if self.probe.request.evaluations == 0 or isinstance(self.own, Iteration):
            return solved.point.clone()
        return self.own.attach(solved)


@contextmanager
def probing(model: nn.Module | DEQ, eps: float | None) -> Iterator[Probe]:
    """A context with one probe in all DEQs of a model, in evaluation mode."""
    parts = [] if isinstance(model, DEQ) else list(model.modules())
    held = [v for part in parts for v in vars(part).values() if isinstance(v, DEQ)]
    deqs = [model] if isinstance(model, DEQ) else list({id(deq): deq for deq in held}.values())
    if not deqs:
        raise InputError(
            f"{type(model).__name__} has no lib.DEQ as an attribute: pass the DEQ itself, and "
            "call the model in forward"
        )
    probe, modes = Probe(eps), [(part, part.training) for part in parts]
    own = [(deq, deq.f_solver, deq.grad, deq.stats) for deq in deqs]
    try:
        for part in parts:
            part.training = False
        for deq, solver, grad, _ in own:
            if isinstance(grad, Iteration):  # it replaces the solver, and has no tolerance
                damping = getattr(grad, "damping", 1.0)
                solver = partial(fixed_point_iteration, eps=0.0, damping=damping)
            deq.grad, deq.f_solver = _Outlet(grad, probe), partial(probe.solve, solver)
            deq.stats = SolverStats()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DEQWarning)  # far starts may well diverge
            yield probe
    finally:
        for deq, solver, grad, stats in own:
            deq.f_solver, deq.stats = solver, stats
            deq.grad = grad  # after the solver: a gradient may refuse another one
        for part, training in modes:
            part.training = training


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
        self.settled = np.all([s.settled for s in found], axis=0)
        self.evaluations = np.sum([s.evaluations for s in found], axis=0)
        self.radius = np.max([s.radius for s in found], axis=0)
        self.met, self.counted = all(s.met for s in found), all(s.counted for s in found)
        self.threshold, self.eps = max(s.threshold for s in found), max(s.eps for s in found)
        # Without another start ``around`` is empty.
        states = zip(found, around, strict=False)
        pairs = [[s.z.flatten(1).double().cpu().numpy() for s in pair] for pair in states]
        away = [relative(*(np.linalg.norm(v, axis=1) for v in (a - b, b))) for a, b in pairs]
        self.distance = np.max(away, axis=0) if away else np.zeros(len(score))


def _run(probe: Probe, call, inputs, target, correct, difficulty, request: Request) -> _Pass:
    probe.request, probe.found = request, []
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for a start, for example
        output = call(inputs)
    if not probe.found:
        raise InputError("the model called no DEQ: audit finds nothing to look at")
    score = _row(correct(output, target), "correct")
    hard = None if difficulty is None else _row(difficulty(output, target), "difficulty")
    return _Pass(score, hard, probe.found, request.around)


def _row(values: Tensor, name: str) -> np.ndarray:
    """Numbers of the samples as (N,) float64."""
    what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    fits = isinstance(what, tuple) and len(what) == 1
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

    def passes(name: Any) -> list[_Pass]:
        # A batch with a lower threshold has fewer cuts: there it counts as it ended.
        return [part.get(name, part[OWN]) for part in parts]

    def of(name: Any, figure: str) -> np.ndarray:
        return np.concatenate([getattr(p, figure) for p in passes(name)])

    def at(name: str) -> dict:
        norms = [np.concatenate(list(p.norms), axis=1) for p in passes(name)]
        g, f = np.linalg.norm(np.concatenate(norms, axis=1), axis=1)
        return {
            "name": name,
            "evaluations": float(of(name, "evaluations").mean()),
            "measure": float(of(name, "score").mean()),
            "residual": float(relative(g, f)),
            "settled": float(of(name, "settled").mean()),
            "met": all(p.met for p in passes(name)),
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

    threshold = max(p.threshold for p in passes(OWN))
    names = ["skipped", *map(str, _cuts(threshold)), OWN]
    names += [f"{n} x threshold" for n in rules.longer]
    scores = {name: of(name, "score") for name in names}
    cuts, others = [at(name) for name in names], [started(start) for start in starts]
    radii = of("reference", "radius")[of("reference", "settled")]
    radius: dict[str, Any] = dict.fromkeys(("mean", "largest", "below_one"))
    if len(radii):
        figures = radii.mean(), radii.max(), (radii < 1).mean()
        radius = dict(zip(radius, map(float, figures), strict=True))
    radius["samples"] = len(radii)
    settled, spent = of("patient", "settled"), of("patient", "evaluations")
    patient, counted = float(settled.mean()), all(p.counted for p in passes("patient"))
    hard = None if parts[0][OWN].hard is None else of(OWN, "hard")
    verdict, reason = judge(scores, cuts, others, radius, patient, rules)
    return Audit(
        verdict=verdict,
        reason=reason,
        measure=measure,
        samples=len(scores[OWN]),
        threshold=threshold,
        eps=max(p.eps for p in passes(OWN)),
        budget=max(rules.longer[-1] * threshold, rules.least),
        patient=patient,
        enough=enough(scores, rules.tolerance),
        cuts=cuts,
        starts=others,
        correctness=correctness(of(OWN, "residual"), scores[OWN], rules),
        effort=effort(spent if counted else None, hard, settled, rules),
        radius=radius,
        rules=rules,
    )
