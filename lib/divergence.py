"""When an iteration diverges: by several steps, never by a single one."""

import math

import numpy as np

# A residual so many times the first one is far out. Measured on the absolute residual in both stop
# modes: the relative residual of z -> 3 z stays at 2/3 for ever.
FAR = 1e6
# Quasi-Newton and Newton steps may lead far out, once, and come back from there. What diverges
# goes on rising: so many new highs in a row, none of them from nearer than that.
HIGHS = 5


def far_out(g: np.ndarray, f: np.ndarray, eps: float) -> np.ndarray:
    """What is far out, from the norms (n,) of g and f at the first point.

    A warm start may have a residual of rounding errors (``eps``, of the format), whose growth says
    nothing: the first residual counts as sqrt(eps) ||f|| at least.
    """
    return FAR * np.maximum(g, math.sqrt(eps) * f)


class Divergence:
    """Which of n samples (or the batch, n = 1) diverge, from their residuals so far.

    Args:
        eps: rounding error of the format.
    """

    def __init__(self, count: int, eps: float):
        self._eps = eps
        self._limit: np.ndarray | None = None  # what is far out, (n,)
        self.far = np.zeros(count, dtype=bool)  # whether the newest residual is far out
        self._highest = np.zeros(count)
        self._highs = np.zeros(count, dtype=np.int64)  # since the residual last was near

    def found(self, g: np.ndarray, f: np.ndarray, rows: np.ndarray | slice = slice(None)):
        """The samples ``rows`` that have diverged by now, by the norms of g and f at a new point.

        The first call sets what is far out, and must be of all samples. Norms that are not finite
        say nothing.
        """
        if self._limit is None:
            self._limit = far_out(g, f, self._eps)
        far = self.far[rows] = g > self._limit[rows]
        if not far.any() and not self._highs[rows].any():  # the usual step
            return far
        higher = far & (g > self._highest[rows])
        self._highest[rows] = np.where(higher, g, self._highest[rows])
        self._highs[rows] = np.where(far, self._highs[rows] + higher, 0)
        return self._highs[rows] >= HIGHS
