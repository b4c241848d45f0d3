"""The loop of every evaluation: sums over batches and processes, means of the solver."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lib.runs.processes import Processes
from lib.runs.solver_figures import summed_stats
from lib.solvers.stats import SolverStats


class EvaluationStopped(Exception):
    """All processes interrupted an evaluation, as the run should stop."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[SolverStats]:
    """A context to evaluate in: eval mode, no gradients, solver statistics of its own (yielded).

    The model's own mode and statistics are restored at its end.
    """
    was_training, stats = model.training, model.deq.stats
    try:
        model.eval()
        model.deq.stats = SolverStats()
        with torch.no_grad():
            yield model.deq.stats
    finally:
        model.deq.stats = stats
        model.train(was_training)


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Any],
    measure: Callable[[Any], dict],
    *,
    processes: Processes,
    stop: Callable[[], bool],
) -> tuple[dict[str, float], dict[str, float]]:
    """Call ``measure`` on each batch, and sum what it returns over batches and processes.

    Every process must make this call.

    Args:
        model: what ``measure`` calls.
        batches: those of this process; there may be none.
        measure: returns numbers or 0-dim tensors by name, the same names for each batch. They are
            summed in float64, without waiting for the GPU.
        stop: called before each batch; True interrupts the evaluation.

    Returns:
        The sums by name, without those that no process returned, and the means of the forward
        solver's statistics.

    Raises:
        EvaluationStopped: in all processes, if ``stop`` returned True in one of them.
        Exception: an error of one process; the others raise an InputError.
    """
    sums: dict[str, Any] = {}
    stopped, error = False, None
    with evaluating(model) as stats:
        try:
            for batch in batches:
                if stopped := stop():
                    break
                for name, value in measure(batch).items():
                    value = value.detach().double() if isinstance(value, torch.Tensor) else value
                    sums[name] = sums.get(name, 0) + value
        except Exception as caught:
            error = caught  # the other processes wait for this one
        processes.raise_together(error)
        means = summed_stats(stats, processes).forward.means()
    found = {name: float(value) for name, value in sums.items()}
    totals: dict[str, float] = {}
    for sums_of_one, stopped_here in processes.gather((found, stopped)):
        stopped = stopped or stopped_here
        for name, value in sums_of_one.items():
            totals[name] = totals.get(name, 0.0) + value
    if stopped:
        raise EvaluationStopped
    return totals, means
