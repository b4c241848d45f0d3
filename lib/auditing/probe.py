"""A probe in the place of a model's solvers: it cuts, lengthens and restarts the model's solves."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn

from lib.deq import DEQ
from lib.errors import DEQWarning, InputError
from lib.gradients import Gradient, Solved
from lib.gradients.attachment import recording_for
from lib.gradients.iterations import Iteration
from lib.jacobian import power_method
from lib.solvers import SOLVERS, fixed_point_iteration
from lib.solvers.arguments import unwrapped
from lib.solvers.norms import relative
from lib.solvers.stats import SolverStats, solve_figures

EPS = 1e-3  # tolerance of a solver that has none


@dataclass(frozen=True)
class Request:
    """How the solves of one forward pass differ from the model's own; by default not at all.

    Attributes:
        evaluations: at most so many, of f and of products; 0 hands the start itself to the head.
        times, least: allow this many times the model's own threshold, and at least ``least``.
        eps: a multiple of the tolerance, by which each sample stops by itself; 0: do not stop.
        start: (kind, scale, seed): noise of ``scale`` * rms(z) * N(0, 1), alone ('drawn') or added
            to the solution z of the same solve in ``around`` ('displaced').
        products: with the Jacobian, for the spectral radius at the solution.
    """

    evaluations: int | None = None
    times: int = 1
    least: int = 0
    eps: float | None = None
    start: tuple[str, float, int] | None = None
    around: tuple["Solution", ...] = ()
    products: int = 0


@dataclass
class Solution:
    """One solve. Its state z (B, ...) is judged by an evaluation of f; figures are on the host."""

    z: Tensor
    norms: np.ndarray  # ||f(z) - z|| and ||f(z)|| of each sample, (2, B)
    settled: np.ndarray  # residual below the tolerance, (B,)
    met: bool  # the same over the whole batch, as a solver may stop by it
    evaluations: np.ndarray  # (B,)
    counted: bool  # whether they are those of each sample by itself
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
            change = _changed if ours else _limited
            solution = change(own, request, threshold, eps)(f, z0, stop_mode=stop_mode)
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


def _granted(request: Request, threshold: int) -> int:
    granted = max(request.times * threshold, request.least)
    return granted if request.evaluations is None else min(granted, request.evaluations)


def _limited(own: Callable, request: Request, threshold: int, eps: float) -> Callable:
    """A user's own solver: it has a threshold, and no more is known of it."""
    return partial(own, threshold=_granted(request, threshold))


def _changed(own: Callable, request: Request, threshold: int, eps: float) -> Callable:
    """One of our solvers with the budget and the tolerance of a request."""
    (function, options), granted = unwrapped(own), _granted(request, threshold)
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
    """Put one probe into all DEQs of a model, in evaluation mode, within a ``with`` block.

    Raises:
        InputError: no part of the module has a DEQ as an attribute.
    """
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
            if isinstance(
                grad, Iteration
            ):  # it replaces the solver; is audited without a tolerance
                solver = partial(
                    fixed_point_iteration, eps=0.0, damping=getattr(grad, "damping", 1.0)
                )
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
