"""Measurements of training steps: interleaved times, where a step spends them, its peak memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers.measure import in_turns, peak_extra_bytes, synchronize
from helpers.tasks import Task
from lib.jacobian import power_method

RADIUS_ITERS = 30  # products with the Jacobian for the spectral radius: enough for two digits


@dataclass
class Steps:
    """What the timed steps of one form took, one entry per step; warm-up has only its losses."""

    forward: list[float] = field(default_factory=list)  # seconds, like the next two
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    f_nfe: list[int] = field(default_factory=list)
    b_nfe: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the warm-up too

    @property
    def totals(self) -> list[float]:
        parts = zip(self.forward, self.backward, self.optimizer, strict=True)
        return [sum(part) for part in parts]


def run_step(task: Task, index: int) -> tuple[list[float], float]:
    """One training step; seconds of forward (with the loss), backward and optimiser, and the
    loss. Making the data is not timed."""
    task.begin(index)
    marks = []

    def mark() -> None:
        synchronize(task.device)
        marks.append(time.perf_counter())

    mark()
    loss = task.loss()
    mark()
    task.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    mark()
    task.update()
    mark()
    return [b - a for a, b in pairwise(marks)], loss.item()


def interleaved(tasks: dict[str, Task], steps: int, warmup: int) -> dict[str, Steps]:
    """``warmup`` and then ``steps`` timed steps of every form, the forms taking turns."""
    found = {name: Steps() for name in tasks}
    for index, name in in_turns(tasks, warmup + steps):
        task, log = tasks[name], found[name]
        (forward, backward, optimizer), loss = run_step(task, index)
        log.losses.append(loss)
        if index < warmup:
            continue
        stats = task.model.deq.stats
        log.forward.append(forward)
        log.backward.append(backward)
        log.optimizer.append(optimizer)
        log.f_nfe.append(stats.forward.last["nfe"])
        log.b_nfe.append(stats.backward.last["nfe"])
    return found


@dataclass
class Shares:
    """One step, measured from inside: with a GPU, waiting for it at every border."""

    step: float = 0.0  # seconds of the whole
    solves: float = 0.0  # of both solvers, their evaluations included
    evaluations: float = 0.0  # of those, f forward and products with its Jacobian backward
    solver_bytes: int = 0  # what the solvers must move at least (least_bytes)

    @property
    def parts(self) -> tuple[float, float, float]:
        """Shares of f, of the solvers' own work, and of all else, which sum to one."""
        solvers = self.solves - self.evaluations
        return tuple(t / self.step for t in (self.evaluations, solvers, self.step - self.solves))


def shares(task: Task, index: int) -> Shares:
    """Take step ``index`` and see where its time goes."""
    found = Shares()

    def timed(solver: Callable, method: str) -> Callable:
        def solve(f, x0: Tensor, **options) -> dict:
            def evaluation(z: Tensor) -> Tensor:
                start = _now(task)
                fz = f(z)
                found.evaluations += _now(task) - start
                return fz

            start = _now(task)
            solution = solver(evaluation, x0, **options)
            found.solves += _now(task) - start
            found.solver_bytes += least_bytes(method, solution["nfe"], x0.nbytes)
            return solution

        return solve

    with _solvers(task, timed):
        seconds, _ = run_step(task, index)
    found.step = sum(seconds)
    return found


def least_bytes(method: str, nfe: int, state: int) -> int:
    """Bytes that a solver must read or write, for a state of ``state`` bytes.

    Per evaluation four passes over the state (f(z), z, the step, the new z); beyond that,
    Broyden's update k reads the k - 1 steps before it twice (for inner products, and to combine
    them), and Anderson reads up to 6 residuals and as many images. What f itself moves is not
    counted.
    """
    passes = 4 * nfe
    if method == "broyden":
        passes += sum(2 * k for k in range(nfe - 1))
    elif method == "anderson":
        passes += sum(2 * min(k, 6) for k in range(1, nfe))
    return passes * state


def flops(task: Task, index: int) -> int:
    """Floating-point operations of the matrix products and convolutions of step ``index``."""
    counter = FlopCounterMode(display=False)
    with counter:
        run_step(task, index)
    return counter.get_total_flops()


def peak_bytes(task: Task, index: int) -> int:
    """Most bytes of tensors at once in step ``index``: what stays between steps, and its own."""
    task.optimizer.zero_grad(set_to_none=True)
    kept = task.kept_bytes()
    extra = peak_extra_bytes(lambda: run_step(task, index), task.device)
    return kept + extra["tensors"]


def spectral_radius(task: Task, index: int) -> Tensor:
    """The radius of df/dz per sample (B,) at the equilibrium of step ``index``."""
    found = []

    def capturing(solver: Callable, method: str) -> Callable:
        def solve(f, x0: Tensor, **options) -> dict:
            solution = solver(f, x0, **options)
            with torch.enable_grad():
                point = solution["result"].detach().clone().requires_grad_()
                found.append(power_method(f(point), point, n_iters=RADIUS_ITERS)[1])
            return solution

        return solve

    task.begin(index)
    with _solvers(task, capturing):
        task.loss()
    return found[0].flatten()


@contextmanager
def _solvers(task: Task, wrap: Callable) -> Iterator[None]:
    """Both solvers of the model, wrapped by ``wrap(solver, its method)`` for a while."""
    model = task.model
    before = model.f_solver, model.b_solver
    model.f_solver, model.b_solver = map(wrap, before, task.methods)
    try:
        yield
    finally:
        model.f_solver, model.b_solver = before


def _now(task: Task) -> float:
    synchronize(task.device)
    return time.perf_counter()
