"""Compare our solvers with torchdeq's, in alternation: overhead, memory, residuals.

    pip install --no-deps torchdeq==0.1.0
    python scripts/benchmarks/bench_solvers.py  # all shapes, a few minutes on two cores
    python scripts/benchmarks/bench_solvers.py --shapes tiny small --repeats 21 --json out.json

Overhead is the time of a solve without its n evaluations of f, per evaluation: (T - n t_f) / n,
with t_f timed in the same round. f(z) = w z + b is elementwise, with |w| up to 0.95, and no solve
stops before its threshold. The tables show medians over the rounds, and the ratio of the medians.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import (
    Counted,
    describe_machine,
    in_new_process,
    in_turns,
    peak_extra_bytes,
    seconds,
    table,
)
from torch import Tensor

from lib.errors import InputError
from lib.runs.command_line import exit_code
from lib.solvers import SOLVERS

# Shapes (batch, ...) of states: two small states, the per-GPU state of the WikiText-103 runs, a
# two-branch image state, and a long state.
SHAPES = {
    "tiny": (4, 64, 32),
    "small": (16, 128, 64),
    "words": (14, 700, 150),
    "images": (32, 24 * 32 * 32 + 24 * 16 * 16, 1),
    "long": (8, 400_000, 1),
}
METHODS = ("broyden", "anderson")
MEMORY_STEPS = (10, 20, 40, 80)
RADIUS = 0.95


def elementwise_map(shape: tuple[int, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    """f(z) = w z + b with |w| <= RADIUS, float32."""
    generator = torch.Generator().manual_seed(0)
    w = (2 * torch.rand(shape, generator=generator) - 1).mul_(RADIUS).to(device)
    b = torch.randn(shape, generator=generator).to(device)
    return lambda z: torch.addcmul(b, w, z)


def hard_map(device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f(z) = z A + b with A symmetric of spectral radius 0.99 (4 samples of 400), float32."""
    generator = torch.Generator().manual_seed(0)
    size = 400
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    a = (q * torch.linspace(-0.99, 0.99, size, dtype=torch.float64)) @ q.T
    b = torch.randn(4, size, generator=generator)
    a, b = a.float().to(device), b.to(device)
    return lambda z: z @ a + b, torch.zeros_like(b)


def ours(method: str, f, x0: Tensor, steps: int) -> Tensor:
    """The result of our solver after ``steps``."""
    return SOLVERS[method](f, x0, threshold=steps, eps=0.0)["result"]


def theirs(method: str, f, x0: Tensor, steps: int) -> Tensor:
    """The result of torchdeq's solver after ``steps``."""
    solver = _torchdeq()[method]
    return solver(f, x0, max_iter=steps, tol=0.0, stop_mode="rel")[0]


LIBRARIES = {"ours": ours, "torchdeq": theirs}


def _torchdeq() -> dict[str, Callable]:
    try:
        from torchdeq.solver.anderson import anderson_solver
        from torchdeq.solver.broyden import broyden_solver
    except ImportError as error:
        raise InputError(
            f"torchdeq is not installed ({error}): pip install --no-deps torchdeq==0.1.0"
        ) from error
    return {"anderson": anderson_solver, "broyden": broyden_solver}


def relative_residual(f, z: Tensor) -> float:
    """||f(z) - z|| / ||f(z)|| over the batch, in float64."""
    fz = f(z).double()
    return ((fz - z.double()).norm() / fz.norm()).item()


def peak_bytes(library: str, method: str, shape: tuple[int, ...], steps: int, kind: str) -> dict:
    """Peak extra memory of one solve; call this in a new process."""
    device = torch.device(kind)
    small = torch.zeros(SHAPES["tiny"], device=device)
    LIBRARIES[library](method, torch.tanh, small, 3)  # do not count one-time setup
    f, x0 = elementwise_map(shape, device), torch.zeros(shape, device=device)
    f(x0)
    return peak_extra_bytes(partial(LIBRARIES[library], method, f, x0, steps), device)


def overhead(shape: tuple[int, ...], method: str, options, device: torch.device) -> dict:
    """One row of the table: both libraries on one shape, in alternating rounds."""
    f, steps = elementwise_map(shape, device), options.iterations
    x0 = torch.zeros(shape, device=device)
    row: dict = {}
    actions, times = {}, {}
    for name, solve in LIBRARIES.items():  # also warms up
        counted = Counted(f)
        residual = relative_residual(f, solve(method, counted, x0, steps))
        memory = in_new_process(peak_bytes, name, method, shape, steps, device.type)
        row[name] = {"nfe": counted.count, "residual": residual, **memory}
        actions[name], times[name] = partial(solve, method, f, x0, steps), []
    for _, name in in_turns(actions, options.repeats):
        nfe = row[name]["nfe"]
        whole = seconds(actions[name], device)
        own = seconds(partial(_evaluate, f, x0, nfe), device)
        times[name].append((whole - own) / nfe)
    for name in LIBRARIES:
        row[name]["ms"] = 1000 * statistics.median(times[name])
    return row


def _evaluate(f, x0: Tensor, count: int) -> None:
    for _ in range(count):
        f(x0)


def overhead_section(options, device) -> list[dict]:
    rows = []
    for name in options.shapes:
        for method in METHODS:
            row = overhead(SHAPES[name], method, options, device)
            rows.append({"shape": name, "size": SHAPES[name], "method": method, **row})
    print(f"\nOverhead beside f, per evaluation of f, {options.iterations} iterations:\n")
    head = ("state", "solver", "ms, ours", "torchdeq", "ratio", "evaluations", "residual, ours",
            "torchdeq")  # fmt: skip
    print(table(head, [_overhead_line(row) for row in rows]))
    print("\nPeak extra memory of the same solves, each in a new process:\n")
    head = ("state", "solver", "resident MiB, ours", "torchdeq", "ratio", "tensors MiB, ours",
            "torchdeq", "ratio")  # fmt: skip
    print(table(head, [_memory_line(row) for row in rows]))
    return rows


def _overhead_line(row: dict) -> list[str]:
    mine, other = row["ours"], row["torchdeq"]
    return [
        f"{row['shape']} {row['size']}",
        row["method"],
        f"{mine['ms']:.3f}",
        f"{other['ms']:.3f}",
        f"**{mine['ms'] / other['ms']:.3f}**",
        f"{mine['nfe']} / {other['nfe']}",
        f"{mine['residual']:.1e}",
        f"{other['residual']:.1e}",
    ]


def _memory_line(row: dict) -> list[str]:
    line = [f"{row['shape']} {row['size']}", row["method"]]
    for kind in ("resident", "tensors"):
        mine, other = (row[name][kind] for name in LIBRARIES)
        ratio = f"**{mine / other:.2f}**" if other else "-"
        line += [f"{mine / 2**20:.1f}", f"{other / 2**20:.1f}", ratio]
    return line


def hard_section(options, device) -> list[dict]:
    """The final residuals on a symmetric map of spectral radius 0.99, float32."""
    f, x0 = hard_map(device)
    rows = []
    for method in METHODS:
        row = {"method": method}
        for name, solve in LIBRARIES.items():
            row[name] = relative_residual(f, solve(method, f, x0, options.hard_steps))
        rows.append(row)
    print(f"\nSymmetric map of spectral radius 0.99, float32, {options.hard_steps} steps:\n")
    lines = [(r["method"], f"{r['ours']:.2e}", f"{r['torchdeq']:.2e}") for r in rows]
    print(table(("solver", "relative residual, ours", "torchdeq"), lines))
    return rows


def memory_section(options, device) -> list[dict]:
    """Peak memory, in vectors of the state, for several numbers of iterations."""
    shape = SHAPES["words"]
    vector = 4 * math.prod(shape)
    rows = []
    for method in METHODS:
        for name in LIBRARIES:
            peaks = {
                steps: in_new_process(peak_bytes, name, method, shape, steps, device.type)
                for steps in MEMORY_STEPS
            }
            rows.append({"method": method, "library": name, "peaks": peaks})
    print(f"\nPeak extra memory against iterations, in vectors of the state {shape}:\n")
    head = ("solver", "library", "counted", *map(str, MEMORY_STEPS), "growth per iteration")
    lines = []
    for row in rows:
        for kind in ("resident", "tensors"):
            used = [row["peaks"][steps][kind] / vector for steps in MEMORY_STEPS]
            growth = (used[-1] - used[0]) / (MEMORY_STEPS[-1] - MEMORY_STEPS[0])
            line = [row["method"], row["library"], kind, *(f"{u:.1f}" for u in used)]
            lines.append([*line, f"{growth:.2f}"])
    print(table(head, lines))
    return rows


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_solvers.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    least = {"iterations": 3, "repeats": 3, "hard_steps": 3}
    parser = Parser(prog="bench_solvers.py", description=__doc__.splitlines()[0], least=least)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="which states")
    add("--iterations", type=int, default=30, help="threshold of every solve")
    add("--repeats", type=int, default=11, help="rounds; medians are printed")
    add("--hard_steps", type=int, default=300, help="steps on the map of spectral radius 0.99")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    device = options.device
    _torchdeq()
    machine = describe_machine(device)
    print(machine)
    figures = {
        "machine": machine,
        "overhead": overhead_section(options, device),
        "hard": hard_section(options, device),
        "memory": memory_section(options, device),
    }
    write_json(options.json, figures)


if __name__ == "__main__":
    sys.exit(main())
