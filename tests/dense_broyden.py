"""Broyden's method with its matrix written out, to compare solvers with."""

import torch
from torch import Tensor

from lib.solvers import broyden
from problems import Problem, visited


class DenseBroyden:
    """H of one sample as a matrix, updated as MODELS.md writes it.

    With ``memory``, by that many of the last updates alone, made anew from -I.
    """

    def __init__(self, size: int, memory: int | None = None):
        self.size, self.memory, self.pairs = size, memory, []

    def update(self, dz: Tensor, dg: Tensor) -> None:
        self.pairs = [*self.pairs, (dz, dg)][-(self.memory or 0) :]

    @property
    def h(self) -> Tensor:
        h = -torch.eye(self.size, dtype=torch.float64)
        for dz, dg in self.pairs:
            image = h @ dg
            h = h + torch.outer(dz - image, h.T @ dz) / (dz @ image)
        return h

    def direction(self, g: Tensor) -> Tensor:
        return -self.h @ g


def compare_with_dense(problem: Problem, *, memory=None, damping=1.0, updates=20) -> int:
    """Each point follows from those before; errors are relative to the step. How many steps.

    20 updates cross two blocks of stored steps. Steps below 1e-6 are left out: there dg, a
    difference of rounded values, loses its digits in the reference itself.
    """
    points = visited(
        broyden, problem.f, problem.x0, threshold=updates, memory=memory, damping=damping
    )
    shape, compared = problem.x0.shape, 0
    residuals = torch.stack([problem.f(p.view(shape)).flatten(1) - p for p in points])
    for b in range(len(problem.x0)):
        dense = DenseBroyden(points.shape[2], memory)
        for k in range(len(points) - 1):
            expected = damping * dense.direction(residuals[k, b])
            taken = points[k + 1, b] - points[k, b]
            if taken.norm() < 1e-6:
                break
            assert (taken - expected).norm() <= 1e-7 * expected.norm()
            dense.update(taken, residuals[k + 1, b] - residuals[k, b])
            compared += 1
    return compared
