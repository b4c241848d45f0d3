"""What mattered for mazes: trainings that differ from mazes.py in one thing each.

python examples/maze_ablations.py [--only NAME ...] [--out FILE]
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from lib import DEQ
from lib.errors import check
from lib.runs.command_line import Parser, exit_code
from mazes import STEPS, Messages, PathFinder, heard, lesson, solve, tests, train

TESTS = {"9 x 9": (9, 0.0, 100), "17 x 17": (17, 0.0, 50), "17 x 17, junctions": (17, 0.5, 50)}


class Mixing(Messages):
    """Messages made from all that is heard, what comes from the listener as well."""

    def __init__(self, inputs: int, width: int = 16):
        nn.Module.__init__(self)
        self.ends = nn.Linear(inputs, 4 * width)
        self.mix = nn.Linear(4 * width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, 4 * width)

    def forward(self, z: Tensor, sides: Tensor, u: Tensor) -> Tensor:
        own = heard(z, sides).permute(0, 2, 3, 1, 4).flatten(3)  # (B, n, n, 4 width)
        message = self.out(torch.relu(self.mix(own) + u[:, 0]))
        message = message.unflatten(-1, (4, -1)).permute(0, 3, 1, 2, 4)
        return rms_norm(message, message.shape[-1:], eps=1e-6)


class Echo(PathFinder):
    def __init__(self):
        super().__init__()
        self.f = Mixing(inputs=2)


class Convolution(PathFinder):
    """Messages pass through walls. f is told where these are, as it is told the ends."""

    def __init__(self):
        super().__init__()
        self.f = Mixing(inputs=6)

    def layer(self, sides: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
        told = torch.cat([ends, sides[..., 0].permute(0, 2, 3, 1)], -1)
        f = super().layer(torch.ones_like(sides), told)
        f.select = lambda rows: self.layer(sides[rows], ends[rows])
        return f


class RandomStart(PathFinder):
    def start(self, sides: Tensor) -> Tensor:
        return torch.randn(*sides.shape[:-1], self.width)


class RandomLimit(PathFinder):
    """Solves in training are cut after n to 2 n evaluations, settled or not."""

    def limit(self, sides: Tensor) -> int:
        n = sides.shape[-2]
        return random.randint(n, 2 * n) if self.training else super().limit(sides)


class Noise(PathFinder):
    """In training, noise of a tenth of the state is added to it at every evaluation."""

    def layer(self, sides: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
        f = super().layer(sides, ends)
        return (lambda z: f(z) + 0.1 * torch.randn_like(z)) if self.training else f


class Plus(torch.autograd.Function):
    """The identity of ``logit``; backward also reduces ``loss``."""

    @staticmethod
    def forward(ctx, logit: Tensor, loss: Tensor) -> Tensor:
        return logit.view_as(logit)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


class JacobianLoss(PathFinder):
    """A tenth of the Jacobian loss is added to the loss."""

    def forward(self, sides: Tensor, ends: Tensor) -> Tensor:
        f, z0 = self.layer(sides, ends), self.start(sides)
        found = self.deq(f, z0, f_thres=self.limit(sides), jac_vecs=1)
        return Plus.apply(self.read(found.z, sides, ends), 0.1 * found.jac_loss)


def with_gradient(grad: str) -> PathFinder:
    model = PathFinder()
    model.deq = DEQ("fixed_point_iteration", grad=grad)
    return model


class Growing:
    """Sizes from 3 to 6 that grow over the first 60 % of the steps."""

    def __init__(self, steps: int):
        self.steps, self.step = steps, 0

    def __call__(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        self.step += 1
        return lesson(rng, largest=min(6, 3 + round(3 * self.step / (0.6 * self.steps))))


# Name: what makes the model, and what makes the lessons of so many steps.
VARIANTS: dict[str, tuple[Callable, Callable]] = {
    "as in mazes.py": (PathFinder, lambda steps: lesson),
    "walls as an input only": (Convolution, lambda steps: lesson),
    "echoes": (Echo, lambda steps: lesson),
    "ends never left out": (PathFinder, lambda steps: partial(lesson, hide=0.0)),
    "corridors only": (PathFinder, lambda steps: partial(lesson, branching=0.0)),
    "sizes that grow": (PathFinder, Growing),
    "n to 2 n evaluations": (RandomLimit, lambda steps: lesson),
    "z0 ~ N(0, 1)": (RandomStart, lambda steps: lesson),
    "noise on the state": (Noise, lambda steps: lesson),
    "Jacobian loss": (JacobianLoss, lambda steps: lesson),
    "jfb": (partial(with_gradient, "jfb"), lambda steps: lesson),
    "ift": (partial(with_gradient, "ift"), lambda steps: lesson),
}


def measure(name: str, seed: int, steps: int) -> dict:
    """Train one variant; the part of exact mazes by test, and the largest residual of all."""
    make, lessons = VARIANTS[name]
    random.seed(seed)
    cpu = time.process_time()
    model, _ = train(seed, steps, make, lessons(steps))
    row = {"name": name, "seed": seed, "cpu_seconds": time.process_time() - cpu}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["exact"], residuals = {}, []
    for test, (n, branching, count) in TESTS.items():
        parts = [solve(model, *batch) for batch in tests(n, count, branching)]
        row["exact"][test] = torch.cat([p["exact"] for p in parts]).double().mean().item()
        residuals += [p["residual"].max().item() for p in parts]
    return row | {"largest_residual": max(residuals)}


def run(args: argparse.Namespace) -> None:
    rows = []
    for name in args.only:
        rows.append(measure(name, args.seed, args.steps))
        print(rows[-1], flush=True)
        if args.out:
            figures = {"steps": args.steps, "rows": rows}
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="maze_ablations.py", description=__doc__.partition("\n")[0])
    names = ", ".join(repr(name) for name in VARIANTS)
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"the trainings, of {names}",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each training")
    parser.add_argument("--out", type=Path, help="write all figures here (JSON)")
    args = parser.parse_args(argv)
    check(args.steps >= 1, "--steps", args.steps, "at least 1")
    there = args.out is None or args.out.parent.is_dir()
    check(there, "--out", str(args.out), "a name in a folder that is there")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code("maze_ablations.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
