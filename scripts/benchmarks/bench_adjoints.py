"""Errors of gradients if f does not contract, and whether a warning reports them.

    python scripts/benchmarks/bench_adjoints.py [--systems 20] [--size 30] [--steps 20]

f(z) = z W + x + b, with W a random matrix scaled to a given spectral radius; one sample; the solver
starts at the fixed point. For a linear loss, dL/dx is the adjoint y = (I - J)^-T g, which a dense
solve gives exactly. For each radius, backward solver and stop mode, the table counts the systems
whose gradient has a relative error above 100 %, and those among them without a warning.
"""

import argparse
import sys
import warnings
from dataclasses import asdict, dataclass, fields

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, table
from torch import Tensor

from lib.deq import DEQ
from lib.runs.command_line import exit_code
from lib.solvers import ADJOINT_SOLVERS

RADII = (0.9, 1.3, 1.6, 1.9, 3.0)
MODES = ("rel", "abs")
HEAD = ("radius", "solver", "off by > 100 %", "of them silent", "warned of", "worst error")


@dataclass
class Count:
    """Counts of systems for one radius, solver and stop mode."""

    wrong: int = 0  # systems with a relative error above 100 %
    silent: int = 0  # of these, systems without a warning
    warned: int = 0  # systems with a warning, wrong or not
    worst: float = 0.0  # largest relative error


def system(seed: int, size: int, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw W (size, size) with spectral radius ``radius``; b and g, (1, size)."""
    generator = torch.Generator().manual_seed(seed)
    w, b, g = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (size, 1, 1))
    return w * radius / torch.linalg.eigvals(w).abs().max(), b, g


def gradient(w: Tensor, b: Tensor, g: Tensor, solver: str, mode: str, steps: int):
    """Return the relative error of dL/dx, and whether there was a warning."""
    identity = torch.eye(len(w), dtype=w.dtype)
    z_star = torch.linalg.solve(identity - w.T, b.T).T
    exact = torch.linalg.solve(identity - w, g.T).T
    x = torch.zeros_like(b, requires_grad=True)
    deq = DEQ("broyden:eps=1e-9", solver, b_stop_mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = deq(lambda z: z @ w + x + b, z_star, b_thres=steps).z
        (z * g).sum().backward()
    return ((x.grad - exact).norm() / exact.norm()).item(), bool(caught)


def count(radius: float, solver: str, mode: str, systems: int, size: int, steps: int) -> Count:
    """Count over ``systems`` random systems."""
    total = Count()
    for seed in range(systems):
        error, warned = gradient(*system(seed, size, radius), solver, mode, steps)
        wrong = not error <= 1
        total.wrong += wrong
        total.silent += wrong and not warned
        total.warned += warned
        total.worst = max(total.worst, error)
    return total


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_adjoints.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = {"systems": 20, "size": 30, "steps": 20}
    least = dict.fromkeys(defaults, 1)
    description = __doc__.partition("\n")[0]
    parser = Parser(prog="bench_adjoints.py", description=description, least=least)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    print(describe_machine(torch.device("cpu")))
    found = {
        (radius, solver): [
            count(radius, solver, mode, args.systems, args.size, args.steps) for mode in MODES
        ]
        for radius in RADII
        for solver in ADJOINT_SOLVERS
    }
    rows = [
        (*how, *(" / ".join(f"{getattr(c, f.name):.2g}" for c in counts) for f in fields(Count)))
        for how, counts in found.items()
    ]
    silent = sum(c.silent for counts in found.values() for c in counts)
    print(f"\nStop mode 'rel' / 'abs', {args.systems} systems, {args.steps} steps:\n")
    print(table(HEAD, rows))
    print(f"\n{silent} gradients are off by more than 100 % without a warning.")
    write_json(args.json, [[*how, *map(asdict, counts)] for how, counts in found.items()])


if __name__ == "__main__":
    sys.exit(main())
