"""Detect divergence: from several steps, never from a single one."""

import math

import numpy as np

# A residual is far out if it is this many times the first residual. Both stop modes measure the
# absolute residual: the relative residual of z -> 3 z stays at 2/3 forever.
FAR = 1e6
# A Newton or quasi-Newton step may lead far out once, and the iteration comes back. A diverging
# iteration keeps rising: it reaches this many new highs without coming back in between.
HIGHS = 5


def far_out(g: np.ndarray, f: np.ndarray, eps: float) -> np.ndarray:
    """Limits (n,) above which a residual is far out, from the norms (n,) of g and f at the start.

    After a warm start the first residual may be pure rounding error, whose growth means nothing. So
    the first residual counts as at least sqrt(eps) ||f||, where ``eps`` is the rounding error of
    the format.
    """
    return FAR * np.maximum(g, math.sqrt(eps) * f)


class Divergence:
    """Finds which of n samples diverge, from their residuals so far.

    Args:
        count: n; 1 for the batch as a whole.
        eps: rounding error of the format.
    """

    def __init__(self, count: int, eps: float):
        self._eps = eps
        self._limit: np.ndarray | None = None  # far out above this, (n,)
        self.far = np.zeros(count, dtype=bool)  # whether the newest residual is far out
        self._highest = np.zeros(count)
        self._highs = np.zeros(count, dtype=np.int64)  # new highs since the residual was last near

    def diverged(self, g: np.ndarray, f: np.ndarray, rows: np.ndarray | slice = slice(None)):
        """Which of the samples ``rows`` have diverged, from the norms of g and f at a new point.

        The first call sets the limits and must cover all samples. Norms that are not finite carry
        no information.
        """
        if self._limit is None:
            self._limit = far_out(g, f, self._eps)
        far = self.far[rows] = g > self._limit[rows]
        if not far.any() and not self._highs[rows].any():  # usual: nothing is far out
            return far
        higher = far & (g > self._highest[rows])
        self._highest[rows] = np.where(higher, g, self._highest[rows])
        self._highs[rows] = np.where(far, self._highs[rows] + higher, 0)
        return self._highs[rows] >= HIGHS
