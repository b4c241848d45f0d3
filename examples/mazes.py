"""Train an equilibrium to find the path in small mazes, then let it solve large ones.

    python examples/mazes.py [--seeds 5] [--sizes 9 17 33] [--stacked] [--picture maze]

Each cell sends a message of 16 numbers to each of its four neighbours. The message to the north is
made of what the cell hears from east, south and west, and of whether it is an end of the path.
Walls let nothing through. The equilibrium is where no message changes any more; a small head then
reads from what a cell hears whether it is on the path.

Given to f are the walls, the ends, and that no message is an echo: what a cell says to a neighbour
does not depend on what it hears from there (as in belief propagation). A maze without loops is a
tree. There a message depends only on the part of the maze behind it, so f settles for any weights,
after as many evaluations as the longest way has cells. Learnt are the 1,217 weights: what to say.
Filling dead ends is one answer: "behind me is no end".
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, rms_norm

from lib import DEQ
from lib.errors import check
from lib.runs.command_line import Parser, exit_code

SIDES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west; d ^ 2 is opposite to d
LARGEST, STEPS, BATCH = 6, 800, 64  # of training: cells per side, steps, mazes per step
STACKS = {"tied, 12": (12, 1), "tied, 40": (40, 1), "untied, 12": (12, 12), "untied, 40": (40, 40)}


def maze(n: int, rng: random.Random, branching: float = 0.0) -> tuple[np.ndarray, ...]:
    """A maze of n x n cells without loops, grown from one cell: which sides are open, ends, path.

    It grows at the newest cell that has a free neighbour, which gives long corridors. With the
    chance ``branching`` it grows at any other cell instead: shorter paths, more junctions.
    """
    free = {(y, x) for y in range(n) for x in range(n)}
    first = rng.choice(sorted(free))
    free.remove(first)
    sides, back, growing = np.zeros((4, n, n)), {}, [first]
    while growing:
        i = rng.randrange(len(growing)) if branching and rng.random() < branching else -1
        y, x = cell = growing[i]
        ways = [(d, (y + dy, x + dx)) for d, (dy, dx) in enumerate(SIDES)]
        ways = [(d, to) for d, to in ways if to in free]
        if not ways:
            growing.pop(i)
            continue
        d, to = rng.choice(ways)
        sides[d, y, x] = sides[(d ^ 2, *to)] = 1
        free.remove(to)
        back[to] = cell
        growing.append(to)

    def home(cell: tuple[int, int]) -> list[tuple[int, int]]:
        way = [cell]
        while way[-1] != first:
            way.append(back[way[-1]])
        return way

    ends, path = np.zeros((n, n, 2)), np.zeros((n, n))
    chosen = rng.sample(sorted({first, *back}), 2)
    one, other = map(home, chosen)
    meeting = next(cell for cell in one if cell in other)
    for k, cell in enumerate(chosen):
        ends[(*cell, k)] = 1
    for cell in {meeting, *set(one).symmetric_difference(other)}:
        path[cell] = 1
    return sides, ends, path


def mazes(
    count: int, n: int, rng: random.Random, branching: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Open sides (count, 4, n, n, 1), the two ends (count, n, n, 2), path (count, n, n): 0 or 1."""
    sides, ends, path = zip(*(maze(n, rng, branching) for _ in range(count)), strict=True)
    sides, ends, path = (torch.from_numpy(np.stack(a)).float() for a in (sides, ends, path))
    return sides[..., None], ends, path


def heard(z: Tensor, sides: Tensor) -> Tensor:
    """What each cell hears from its four sides, of what its neighbours say (B, 4, n, n, width)."""
    said = [z[:, d ^ 2].roll((-dy, -dx), (1, 2)) for d, (dy, dx) in enumerate(SIDES)]
    return torch.stack(said, 1) * sides


class Messages(nn.Module):
    """f(z) = rms_norm(W relu(V (sum of what is heard from the other three sides) + U ends)).

    z[:, d] is what each cell says to its side d (B, 4, n, n, width).
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.ends = nn.Linear(2, width)
        self.mix = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, z: Tensor, sides: Tensor, u: Tensor) -> Tensor:
        own = heard(z, sides)
        others = own.sum(1, keepdim=True) - own
        message = self.out(torch.relu(self.mix(others) + u))
        return rms_norm(message, message.shape[-1:], eps=1e-6)


class Reader(nn.Module):
    """A logit for each cell: is it on the path (B, n, n)?"""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 2, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, z: Tensor, sides: Tensor, ends: Tensor) -> Tensor:
        return self.net(torch.cat([heard(z, sides).sum(1), ends], -1))[..., 0]


class PathFinder(nn.Module):
    """Open sides and ends of mazes to logits (B, n, n), at the fixed point of the messages."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.width, self.f, self.read = width, Messages(width), Reader(width)
        self.deq = DEQ("fixed_point_iteration", grad="phantom:steps=3,damping=1")

    def layer(self, sides: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
        """f as a function of the state alone."""
        u = self.f.ends(ends)[:, None]  # does not depend on z: computed once

        def f(z: Tensor) -> Tensor:
            return self.f(z, sides, u)

        f.select = lambda rows: self.layer(sides[rows], ends[rows])  # so that solved mazes rest
        return f

    def start(self, sides: Tensor) -> Tensor:
        return sides.new_zeros(*sides.shape[:-1], self.width)

    def limit(self, sides: Tensor) -> int:
        """Evaluations at most: no way is longer than all cells."""
        return sides[0, 0].numel() + 2

    def forward(self, sides: Tensor, ends: Tensor) -> Tensor:
        f, z0 = self.layer(sides, ends), self.start(sides)
        return self.read(self.deq(f, z0, f_thres=self.limit(sides)).z, sides, ends)


class Stack(nn.Module):
    """The same f applied a fixed number of times, with one set of weights or many."""

    def __init__(self, depth: int, sets: int, width: int = 16):
        super().__init__()
        self.depth, self.width, self.read = depth, width, Reader(width)
        self.layers = nn.ModuleList(Messages(width) for _ in range(sets))

    def forward(self, sides: Tensor, ends: Tensor) -> Tensor:
        z = sides.new_zeros(*sides.shape[:-1], self.width)
        for i in range(self.depth):
            layer = self.layers[i % len(self.layers)]
            z = layer(z, sides, layer.ends(ends)[:, None])
        return self.read(z, sides, ends)


def lesson(
    rng: random.Random, largest: int = LARGEST, branching: float = 0.5, hide: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Mazes for one step of training.

    An end is left out with the chance ``hide``. With one end, or none, there is no path: so a cell
    that has not heard of both ends yet has a right answer as well, "no".
    """
    sides, ends, path = mazes(BATCH, rng.randint(3, largest), rng, branching)
    hidden = torch.rand(BATCH, 1, 1, 2) < hide
    return sides, ends * ~hidden, path * ~hidden.any(-1)


def train(
    seed: int = 0,
    steps: int = STEPS,
    make: Callable[[], nn.Module] = PathFinder,
    draw: Callable[[random.Random], tuple[Tensor, Tensor, Tensor]] = lesson,
) -> tuple[nn.Module, list[float]]:
    """A trained model, and the loss of each step."""
    torch.manual_seed(seed)
    rng, model, losses = random.Random(seed), make(), []
    adam = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1, (step + 1) / 30, 2 * (1 - step / steps))
    )
    for _ in range(steps):
        sides, ends, path = draw(rng)
        loss = binary_cross_entropy_with_logits(model(sides, ends), path)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


def exact(logit: Tensor, path: Tensor) -> Tensor:
    """Whether every cell of a maze is right (B,)."""
    return ((logit > 0) == (path > 0)).flatten(1).all(1)


@torch.no_grad()
def solve(model: PathFinder, sides: Tensor, ends: Tensor, path: Tensor) -> dict[str, Tensor]:
    """Solve each maze to a relative residual of 1e-3; figures of each maze (B,).

    "right_from" is the number of evaluations from which on the answer is right.
    """
    f, z = model.layer(sides, ends), model.start(sides)
    deq = DEQ("fixed_point_iteration:stop=sample,eps=1e-3")
    found = deq(f, z, f_thres=model.limit(sides), training=False)
    evaluations = torch.as_tensor(found.solution["sample_nfe"])
    right_from = torch.ones_like(evaluations)
    for step in range(1, int(evaluations.max()) + 1):
        z = f(z)
        right_from[~exact(model.read(z, sides, ends), path)] = step + 1
    return {
        "exact": exact(model.read(found.z, sides, ends), path).int(),
        "residual": torch.as_tensor(found.solution["residual"]),
        "evaluations": evaluations,
        "path": path.sum((1, 2)).int(),
        "right_from": right_from,
    }


# ---- the command ---------------------------------------------------------------------------------


def tests(n: int, count: int, branching: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same mazes of n x n cells for every model, ten at a time."""
    rng = random.Random(n)
    for left in range(0, count, 10):
        yield mazes(min(10, count - left), n, rng, branching)


def measure(model: PathFinder, n: int, count: int, branching: float) -> dict[str, list]:
    """Solve the test mazes of one size and kind; print and return the figures of each maze."""
    parts = [solve(model, *test) for test in tests(n, count, branching)]
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    mean = {key: figures.double().mean() for key, figures in found.items()}
    print(
        f"  {n:3} x {n:<3} {'junctions' if branching else 'corridors'}  "
        f"exact {mean['exact']:.3f}  largest residual {found['residual'].max():.0e}  "
        f"path {mean['path']:.0f}  right from {mean['right_from']:.0f}  "
        f"settled from {mean['evaluations']:.0f}",
        flush=True,
    )
    found["residual"] = found["residual"].max()
    return {"size": n, "branching": branching, **{k: v.tolist() for k, v in found.items()}}


def timed(seed: int, steps: int, make: Callable[[], nn.Module]) -> tuple[nn.Module, dict]:
    """A trained model, and what it cost."""
    clock, cpu = time.perf_counter(), time.process_time()
    model, _ = train(seed, steps, make)
    cost = {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
    }
    print(f"seed {seed}: {cost['parameters']} parameters, trained for {cost['seconds']:.0f} s")
    return model, cost


def run(args: argparse.Namespace) -> None:
    figures = {"date": str(date.today()), "threads": torch.get_num_threads(), "steps": args.steps}
    figures |= {"torch": torch.__version__, "equilibria": [], "stacks": []}
    for seed in range(args.seeds):
        model, cost = timed(seed, args.steps, PathFinder)
        if seed == 0 and args.save:
            torch.save(model.state_dict(), args.save)
        if seed == 0 and args.picture:
            from maze_pictures import draw  # which needs pillow

            draw(model, *mazes(1, max(args.sizes), random.Random(1))[:2], args.picture)
        kinds = itertools.product(args.sizes, (0.0, 0.5))
        tested = [measure(model, n, args.mazes, branching) for n, branching in kinds]
        figures["equilibria"].append({**cost, "tests": tested})
        write(args.out, figures)
    for seed, (name, shape) in itertools.product(range(args.stacked), STACKS.items()):
        stack, cost = timed(seed, args.steps, partial(Stack, *shape))
        scores = {n: accuracy(stack, n, args.mazes) for n in args.sizes}
        print(f"  {name}: exact", *(f"{score:.2f} at {n}" for n, score in scores.items()))
        figures["stacks"].append({**cost, "name": name, "exact": scores})
        write(args.out, figures)


@torch.no_grad()
def accuracy(model: nn.Module, n: int, count: int) -> float:
    """The part of the test mazes that is exact."""
    parts = [exact(model(sides, ends), path) for sides, ends, path in tests(n, count, 0.0)]
    return torch.cat(parts).double().mean().item()


def write(path: Path | None, figures: dict) -> None:
    if path:
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mazes.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="trainings, with the seeds 0, 1, ...")
    add("--steps", type=int, default=STEPS, help="steps of each training")
    add("--sizes", type=int, nargs="+", default=[9, 17, 33], help="cells per side, in the tests")
    add("--mazes", type=int, default=100, help="mazes of each size and kind, in the tests")
    add("--stacked", type=int, nargs="?", const=1, default=0, metavar="SEEDS",
        help="train stacks of the same f, too, with so many seeds each")  # fmt: skip
    add("--picture", type=Path, help="draw a maze of the largest size, to PICTURE.gif and .png")
    add("--save", type=Path, help="write the weights of the first seed here")
    add("--out", type=Path, help="write all figures here (JSON)")
    args = parser.parse_args(argv)
    for flag, least in {"seeds": 1, "steps": 1, "mazes": 1, "stacked": 0}.items():
        check(getattr(args, flag) >= least, f"--{flag}", getattr(args, flag), f"at least {least}")
    check(min(args.sizes) >= 2, "--sizes", args.sizes, "at least 2 each")
    for flag in ("picture", "save", "out"):  # before the training, not after it
        path = getattr(args, flag)
        there = path is None or path.parent.is_dir()
        check(there, f"--{flag}", str(path), "a name in a folder that is there")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code("mazes.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
