"""Compare gradients and adjoint solvers: accuracy, products, samples, memory.

    python scripts/benchmarks/bench_gradients.py                      # some minutes on two cores
    python scripts/benchmarks/bench_gradients.py --only accuracy --json out.json

accuracy: cosine and relative error of every gradient against the exact one (from a dense solve in
    float64), on three layers at spectral radius 0.5, 0.9 and 0.99.
products: vector-Jacobian products that each solver needs for a relative residual of 1e-6.
samples: sum over evaluations of f of their samples, when stopping by batch and by sample.
memory: bytes held between forward and backward, for several numbers of iterations.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
from helpers.arguments import Parser, write_json
from helpers.equilibria import LAYERS, Equilibrium, equilibrium, loss
from helpers.measure import Counted, describe_machine, held_bytes, in_new_process, table
from torch import Tensor

from lib.deq import DEQ, DEQWarning
from lib.gradients.iterations import Reversible
from lib.runs.command_line import exit_code
from lib.solvers import SOLVERS, get_solver
from lib.solvers.maps import Affine

RADII = (0.5, 0.9, 0.99)
TIGHT = "broyden:eps=1e-13"

# ---- accuracy --------------------------------------------------------------------------------

# label -> forward solver, backward solver, gradient, forward threshold, backward threshold
GRADIENTS = {
    "ift, gmres to 1e-12": (TIGHT, "gmres:eps=1e-12", "ift", 600, 600),
    "ift, bicgstab to 1e-12": (TIGHT, "bicgstab:eps=1e-12", "ift", 600, 600),
    "ift, broyden to 1e-12": (TIGHT, "broyden:eps=1e-12", "ift", 600, 600),
    "ift, anderson to 1e-12": (TIGHT, "anderson:eps=1e-12", "ift", 600, 600),
    "ift, broyden, 12 evaluations": (TIGHT, "broyden:eps=0.0", "ift", 600, 12),
    "ift, gmres, 12 products": (TIGHT, "gmres:eps=0.0", "ift", 600, 13),
    "shine": (TIGHT, "gmres", "shine", 600, 1),
    "shine after 12 evaluations": ("broyden:eps=0.0", "gmres", "shine", 12, 1),
    "shine:refine=5": (TIGHT, "broyden:eps=0.0", "shine:refine=5", 600, 1),
    "jfb": (TIGHT, "gmres", "jfb", 600, 1),
    "phantom:steps=3,damping=0.8": (TIGHT, "gmres", "phantom:steps=3,damping=0.8", 600, 1),
    "the same, neumann": (TIGHT, "gmres", "phantom:steps=3,damping=0.8,form=neumann", 600, 1),
    "phantom:steps=5,damping=0.5": (TIGHT, "gmres", "phantom", 600, 1),
    "reversible, 6 evaluations": (TIGHT, "gmres", "reversible", 6, 1),
    "reversible, 24 evaluations": (TIGHT, "gmres", "reversible", 24, 1),
    "unroll, 6 evaluations": (TIGHT, "gmres", "unroll", 6, 1),
    "unroll, 24 evaluations": (TIGHT, "gmres", "unroll", 24, 1),
}


def gradient_by(problem: Equilibrium, f_solver, b_solver, grad, f_thres, b_thres) -> Tensor:
    """The gradient of all weights, as one vector."""
    deq = DEQ(f_solver, b_solver, grad=grad)
    z = deq(problem.f, problem.start, f_thres=f_thres, b_thres=b_thres).z
    return problem.gradient(z)


def compared(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Cosine and relative error of ``found`` against ``exact``."""
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0).item()
    return cosine, ((found - exact).norm() / exact.norm()).item()


def coupled(problem: Equilibrium, evaluations: int, damping: float) -> Tensor:
    """The reversible iteration, to be differentiated by plain autograd."""
    y = z = problem.start
    for _ in range(evaluations // 2):
        y = (1 - damping) * y + damping * problem.f(z)
        z = (1 - damping) * z + damping * problem.f(y)
    return z


def identities(problem: Equilibrium) -> dict[str, float]:
    """Relative differences between gradients that should be equal."""
    by = partial(gradient_by, problem)
    pair = {
        "reversible and its own unrolled iteration": (
            by(*GRADIENTS["reversible, 24 evaluations"]),
            problem.gradient(coupled(problem, 24, Reversible().damping)),
        ),
        "phantom, unrolled and Neumann": (
            by(*GRADIENTS["phantom:steps=3,damping=0.8"]),
            by(*GRADIENTS["the same, neumann"]),
        ),
        "phantom of one full step and jfb": (
            by(TIGHT, None, "phantom:steps=1,damping=1", 600, 1),
            by(*GRADIENTS["jfb"]),
        ),
    }
    return {name: compared(*both)[1] for name, both in pair.items()}


def accuracy_section(options) -> list[dict]:
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DEQWarning)
        for layer in LAYERS:
            for radius in RADII:
                problem = equilibrium(layer, radius)
                exact = problem.exact()
                found = {
                    label: compared(gradient_by(problem, *how), exact)
                    for label, how in GRADIENTS.items()
                }
                rows.append(
                    {"layer": layer, "radius": radius, **found, "same": identities(problem)}
                )
    print("\nCosine and relative error to the exact gradient, float64, by spectral radius:\n")
    head = ("gradient", *(f"{row['layer']} {row['radius']}" for row in rows))
    lines = [
        [label, *(f"{row[label][0]:.4f}, {row[label][1]:.0e}" for row in rows)]
        for label in GRADIENTS
    ]
    print(table(head, lines))
    print("\nRelative differences of gradients that are to be equal:\n")
    same = [[name, *(f"{row['same'][name]:.0e}" for row in rows)] for name in rows[0]["same"]]
    print(table(head, same))
    return rows


# ---- products --------------------------------------------------------------------------------

ADJOINT_SOLVERS = {
    "gmres": "gmres",
    "gmres, restart 40": "gmres:restart=40",
    "bicgstab": "bicgstab",
    "broyden": "broyden",
    "anderson m 6": "anderson:m=6",
    "anderson m 20": "anderson:m=20",
    "anderson m 6, lam 1e-4": "anderson:m=6,lam=1e-4",
    "anderson m 20, lam 1e-4": "anderson:m=20,lam=1e-4",
}
SYSTEMS = ("symmetric 0.9", "symmetric 0.99", "random 0.9", "random 0.99", "complex 1.3")
SIZE, MOST_PRODUCTS, ACCURACY = 300, 1000, 1e-6


def system(name: str, seed: int) -> Tensor:
    """Draw J (SIZE, SIZE) with the spectral radius that ``name`` gives.

    "symmetric" has evenly spaced eigenvalues, "random" is Gaussian. "complex" is normal, with
    complex pairs of eigenvalues; their angles stay away from 0, where I - J could be singular.
    """
    kind, radius = name.split()[0], float(name.split()[1])
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    noise = draw(SIZE, SIZE)
    if kind == "random":
        return radius * noise / torch.linalg.eigvals(noise).abs().max()
    basis, _ = torch.linalg.qr(noise)
    if kind == "symmetric":
        values = torch.linspace(-radius, radius, SIZE, dtype=torch.float64)
        return (basis * values) @ basis.T
    moduli = torch.linspace(0.1, radius, SIZE // 2, dtype=torch.float64)
    angles = 0.6 + (math.pi - 0.6) * torch.rand(SIZE // 2, generator=generator).double()
    block = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for i, (r, a) in enumerate(zip(moduli.tolist(), angles.tolist(), strict=True)):
        c, s = r * math.cos(a), r * math.sin(a)
        block[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]])
    return basis @ block @ basis.T


def products_needed(solver: str, matrix: Tensor, seed: int) -> int | None:
    """Count products until the relative residual is below ACCURACY; None if it stays above."""
    generator = torch.Generator().manual_seed(1000 + seed)
    grad = torch.randn(1, SIZE, generator=generator, dtype=torch.float64)
    zero, product = torch.zeros_like(grad), Counted(lambda v: v @ matrix)
    solution = get_solver(f"{solver}{',' if ':' in solver else ':'}eps={ACCURACY}", adjoint=True)(
        Affine(product, grad, zero), zero, threshold=MOST_PRODUCTS
    )
    y = solution["result"]
    image = y @ matrix + grad
    residual = ((image - y).norm() / image.norm()).item()
    return product.count if residual < ACCURACY else None


def products_section(options) -> list[dict]:
    rows = [
        {
            "system": name,
            "seed": seed,
            **{
                label: products_needed(solver, system(name, seed), seed)
                for label, solver in ADJOINT_SOLVERS.items()
            },
        }
        for name in SYSTEMS
        for seed in range(options.seeds)
    ]
    print(
        f"\nProducts with J' to a relative residual of {ACCURACY:g}, float64, {SIZE} unknowns, "
        f"means over {options.seeds} systems (-: some not in {MOST_PRODUCTS}):\n"
    )
    lines = []
    for label in ADJOINT_SOLVERS:
        line = [label]
        for name in SYSTEMS:
            counts = [row[label] for row in rows if row["system"] == name]
            line.append("-" if None in counts else f"{sum(counts) / len(counts):.0f}")
        logs = [math.log(row[label] / row["broyden"]) for row in rows if row[label] is not None]
        ratios = sorted(math.exp(x) for x in logs)
        mean = math.exp(sum(logs) / len(logs)) if len(logs) == len(rows) else None
        line.append("-" if mean is None else f"{mean:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(line)
    print(table(("solver", *SYSTEMS, "of Broyden's"), lines))
    return rows


# ---- samples ---------------------------------------------------------------------------------


class MixedBatch:
    """z -> z A_i + b_i; each of the 16 samples has its own spectral radius, 0.3 to 0.99."""

    def __init__(self, matrices: Tensor, shift: Tensor):
        self.matrices, self.shift, self.rows = matrices, shift, 0

    @classmethod
    def drawn(cls) -> "MixedBatch":
        batch, size = 16, 60
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        matrices = draw(batch, size, size)
        radii = torch.linspace(0.3, 0.99, batch, dtype=torch.float64)
        own = torch.linalg.eigvals(matrices).abs().amax(1)
        return cls(matrices * (radii / own)[:, None, None], draw(batch, size))

    def __call__(self, z: Tensor) -> Tensor:
        self.rows += len(z)
        return torch.baddbmm(self.shift[:, None], z[:, None], self.matrices)[:, 0]

    def select(self, rows: Tensor) -> "Callable[[Tensor], Tensor]":
        part = MixedBatch(self.matrices[rows], self.shift[rows])

        def f(z: Tensor) -> Tensor:
            self.rows += len(z)
            return part(z)

        return f


def samples_section(options) -> list[dict]:
    rows = []
    for name in ("fixed_point_iteration", "anderson", "broyden"):
        row = {"solver": name}
        for stop in ("batch", "sample"):
            f = MixedBatch.drawn()
            x0 = torch.zeros_like(f.shift)
            found = SOLVERS[name](f, x0, threshold=2000, eps=1e-8, stop=stop)
            row[stop] = {"rows": f.rows, "worst": found["residual"].max().item()}
        together, apart = found["result"], []
        for i in range(len(x0)):
            alone = f.select(torch.tensor([i]))
            apart.append(SOLVERS[name](alone, x0[:1], threshold=2000, eps=1e-8, stop="sample"))
        apart = torch.cat([one["result"] for one in apart])
        row["difference"] = ((together - apart).norm(dim=1) / apart.norm(dim=1)).max().item()
        rows.append(row)
    print("\n16 samples of spectral radius 0.3 to 0.99, to 1e-8, float64: evaluations x samples\n")
    head = ("solver", "stop='batch'", "stop='sample'", "ratio", "worst sample, batch",
            "worst, sample", "alone or together")  # fmt: skip
    lines = [
        [
            row["solver"],
            row["batch"]["rows"],
            row["sample"]["rows"],
            f"{row['sample']['rows'] / row['batch']['rows']:.2f}",
            f"{row['batch']['worst']:.1e}",
            f"{row['sample']['worst']:.1e}",
            f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    print(table(head, lines))
    return rows


# ---- memory ----------------------------------------------------------------------------------

HELD = {
    "ift": "broyden",
    "shine": "broyden",
    "shine, broyden:memory=8": "broyden:memory=8",
    "jfb": "broyden",
    "phantom:steps=3,damping=0.8": "broyden",
    "phantom:steps=3,damping=0.8,form=neumann": "broyden",
    "reversible": "broyden",
    "unroll": "broyden",
    "unroll:checkpointing=true": "broyden",
}
ITERATIONS = (6, 12, 24)


def held_after_forward(grad: str, solver: str, iterations: int) -> int:
    """Return the bytes that a forward keeps for backward; call this in a new process."""
    torch.set_num_threads(1)
    size = 250_000
    weight, x = torch.nn.Parameter(torch.rand(size)), torch.randn(4, size)
    deq = DEQ(f"{solver}{',' if ':' in solver else ':'}eps=0.0", grad=grad)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.9 * weight * z + x)

    def forward() -> Tensor:
        return loss(deq(f, torch.zeros_like(x), f_thres=iterations).z)

    forward()
    return held_bytes(forward)


def memory_section(options) -> list[dict]:
    vector = 4 * 4 * 250_000
    rows = []
    for label, solver in HELD.items():
        grad = label.partition(", ")[0] if label.startswith("shine,") else label
        held = [in_new_process(held_after_forward, grad, solver, n) for n in ITERATIONS]
        rows.append({"gradient": label, "held": dict(zip(ITERATIONS, held, strict=True))})
    print("\nHeld between forward and backward, in vectors of the state, by iterations:\n")
    lines = [
        [row["gradient"], *(f"{b / vector:.2f}" for b in row["held"].values())] for row in rows
    ]
    print(table(("gradient", *map(str, ITERATIONS)), lines))
    return rows


SECTIONS = {
    "accuracy": accuracy_section,
    "products": products_section,
    "samples": samples_section,
    "memory": memory_section,
}


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_gradients.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_gradients.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    add("--seeds", type=int, default=5, choices=range(1, 100), metavar="N", help="systems per kind")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    machine = describe_machine(torch.device("cpu"))
    print(machine)
    figures = {name: SECTIONS[name](options) for name in options.only}
    write_json(options.json, {"machine": machine, **figures})


if __name__ == "__main__":
    sys.exit(main())
