"""Statistics of solves: figures of one solve, running means over many solves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan


def solve_figures(solution: dict) -> dict:
    """nfe, both residuals and ``broken`` of one solve, from the solver's dict.

    ``nfe`` includes products with the Jacobian. A user's own solver may return fewer keys than
    ours; without traces the residuals are NaN.
    """
    index = solution.get("nstep", -1)
    absolute, relative = (solution.get(f"{mode}_trace") or [nan] for mode in ("abs", "rel"))
    return {
        "nfe": solution.get("nfe", len(absolute)) + solution.get("products", 0),
        "abs_residual": float(solution.get("abs_lowest", absolute[index])),
        "rel_residual": float(solution.get("rel_lowest", relative[index])),
        "broken": bool(solution.get("prot_break", False)) or not all_finite(solution),
    }


def all_finite(solution: dict) -> bool:
    """Whether f stayed finite for all samples; True if the solver does not say.

    Ours give ``all_finite`` on the host: reading ``finite`` would wait for the device.
    """
    if "all_finite" in solution:
        return solution["all_finite"]
    finite = solution.get("finite")
    return finite is None or bool(finite.all())


def scalars_to(writer, step: int) -> Callable[[str, dict], None]:
    """An ``on_solve`` callback that writes residuals and nfe to a TensorBoard SummaryWriter."""

    def write(which: str, solution: dict) -> None:
        figures = solve_figures(solution)
        for name in ("abs_residual", "rel_residual", "nfe"):
            writer.add_scalar(f"{which}/{name}", figures[name], step)

    return write


@dataclass
class PassStats:
    """Running statistics of the solves of one pass. Their size does not grow with the run."""

    solves: int = 0
    nfe: int = 0
    abs_residual: float = 0.0
    rel_residual: float = 0.0
    broken: int = 0  # solves with prot_break, or with a sample that is not finite
    last: dict = field(default_factory=dict)
    last_broken: dict = field(default_factory=dict)  # figures of the last broken solve

    def add(self, solution: dict) -> None:
        self.last = solve_figures(solution)
        self.solves += 1
        self.nfe += self.last["nfe"]
        self.abs_residual += self.last["abs_residual"]
        self.rel_residual += self.last["rel_residual"]
        self.broken += self.last["broken"]
        if self.last["broken"]:
            self.last_broken = self.last

    def means(self) -> dict[str, float]:
        """Mean nfe and residuals, and the count of broken solves."""
        n = max(self.solves, 1)
        return {
            "nfe": self.nfe / n,
            "abs_residual": self.abs_residual / n,
            "rel_residual": self.rel_residual / n,
            "broken": self.broken,
        }


@dataclass
class SolverStats:
    """Statistics of both passes. DataParallel replicas copy the reference, and so share them."""

    forward: PassStats = field(default_factory=PassStats)
    backward: PassStats = field(default_factory=PassStats)

    def reset(self) -> None:
        self.forward, self.backward = PassStats(), PassStats()
