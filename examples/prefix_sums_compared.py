"""Prefix sums by equilibria, by stacked networks, and by other gradients: figures and a picture.

    python examples/prefix_sums_compared.py --stacked 1 --out figures.json --figure picture.png
    python examples/prefix_sums_compared.py --from figures.json --figure picture.png

The stacked networks have the same layer, data and optimiser as the equilibrium in prefix_sums.py:
12 or 40 layers, with one set of weights (tied) or one per layer (untied), trained for the same
number of steps and for twice as many. Seconds of training are of the processor, over all threads.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from lib.errors import InputError, check, check_count, command_needs
from prefix_sums import GRAD, PLAIN, TRAINED, WINDOWS, Layer, fit, measure, strings, train

BITS = {8: 100, 16: 100, 32: 100, 64: 100, 128: 100, 512: 100, 2048: 20}  # -> strings of a test
STACKS = [(depth, tied, times) for depth in (12, 40) for tied in (True, False) for times in (1, 2)]
OTHERS = ("jfb", "ift")  # gradients
LONGEST_OF_OTHERS = 512  # bits: a solve that does not converge takes all evaluations it may
# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, GREEN, RED, ORANGE, INK = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#555555"
STACKED_LINES = {
    "12 layers, tied": (ORANGE, "o-"),
    "12 layers, untied": (ORANGE, "s--"),
    "40 layers, tied": (RED, "o-"),
    "40 layers, untied": (RED, "s--"),
}


class Stack(nn.Module):
    """The layer applied ``depth`` times from zeros, with one set of weights or with many."""

    def __init__(self, depth: int, tied: bool, width: int = 32):
        super().__init__()
        self.depth, self.width, self.head = depth, width, nn.Conv1d(width, 2, 1)
        self.layers = nn.ModuleList(Layer(width) for _ in range(1 if tied else depth))

    def forward(self, x: Tensor, evaluations: int | None = None) -> Tensor:
        """``evaluations`` is there for the training loop of the equilibrium: the depth is fixed."""
        z = torch.zeros(len(x), self.width, x.shape[-1])
        for i in range(self.depth):
            layer = self.layers[i % len(self.layers)]
            z = layer(z, layer.inject(x))
        return self.head(z)


@torch.no_grad()
def measure_stack(stack: Stack, length: int, number: int) -> dict:
    """The share of random strings that is right in all bits."""
    x, y = strings(number, length)
    return {"exact": (stack(x).argmax(1) == y).all(1).double().mean().item()}


def equilibrium(seed: int, steps: int, grad: str = GRAD) -> dict:
    """Train and test an equilibrium."""
    started = time.process_time()
    model = train(seed, grad, steps)
    seconds = time.process_time() - started
    ours = grad == GRAD
    tests = [
        {"bits": bits, "strings": number, "way": way} | measure(model, way, bits, number)
        for bits, number in BITS.items()
        if ours or bits <= LONGEST_OF_OTHERS
        for way in ([PLAIN, WINDOWS] if ours else [PLAIN])
    ]
    name = "equilibrium" if ours else f"equilibrium, {grad}"
    return {"name": name, "seed": seed, "steps": steps, "seconds": seconds, "tests": tests}


def stacked(seed: int, steps: int, depth: int, tied: bool) -> dict:
    """Train and test a stacked network."""
    torch.manual_seed(seed)
    stack = Stack(depth, tied)
    started = time.process_time()
    fit(stack, steps)
    seconds = time.process_time() - started
    tests = [
        {"bits": bits, "strings": number, "way": "stack"} | measure_stack(stack, bits, number)
        for bits, number in BITS.items()
    ]
    name = f"{depth} layers, {'tied' if tied else 'untied'}"
    return {"name": name, "seed": seed, "steps": steps, "seconds": seconds, "tests": tests}


def runs(args: argparse.Namespace):
    """Train what the flags ask for; yield the figures of each run."""
    for seed in range(args.seeds):
        yield equilibrium(seed, args.steps)
    for seed in range(max(args.stacked, args.grads)):
        for depth, tied, times in STACKS if seed < args.stacked else ():
            yield stacked(seed, times * args.steps, depth, tied)
        for grad in OTHERS if seed < args.grads else ():
            yield equilibrium(seed, args.steps, grad)


def show(run: dict) -> None:
    """Print the figures of one run."""
    print(f"{run['name']}, seed {run['seed']}: {run['steps']} steps, {run['seconds']:.0f} s")
    for test in run["tests"]:
        more = ""
        if "residual" in test:
            more = f"  residual {test['residual']:.1e}  evaluations {test['evaluations']:.0f}"
        print(f"{test['bits']:6}  {test['way']:15}  exact {test['exact']:.3f}{more}", flush=True)


def curve(found: dict, name: str, way: str, key: str) -> tuple[list[int], list[float]]:
    """Lengths, and the mean over the seeds at each; of the longest training of this name."""
    runs = [run for run in found["runs"] if run["name"] == name]
    steps = max((run["steps"] for run in runs), default=0)
    tests = [t for run in runs if run["steps"] == steps for t in run["tests"] if t["way"] == way]
    bits = sorted({test["bits"] for test in tests})
    return bits, [fmean(t[key] for t in tests if t["bits"] == n) for n in bits]


def draw(found: dict, file: Path) -> None:
    """Left: the share of strings that are right in all bits. Right: evaluations of f per bit."""
    with command_needs("runs", "prefix_sums_compared.py"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    with rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        for name, (colour, line) in STACKED_LINES.items():
            left.plot(*curve(found, name, "stack", "exact"), line, color=colour, lw=2, ms=6)
        left.plot(*curve(found, "equilibrium", PLAIN, "exact"), "o-", color=BLUE, lw=3)
        left.set(title="strings right in every bit", ylim=(-0.06, 1.16), yticks=[0, 0.5, 1])
        left.axvspan(3.2, TRAINED, color="#eeeeee", zorder=0)
        left.text(10, 1.06, "training", ha="center", color=INK)
        left.text(300, 1.06, "equilibrium", ha="center", color=BLUE, weight="bold")
        left.text(50, 0.5, "40 layers", color=RED, weight="bold")
        left.text(3.4, 0.45, "12\nlayers", color=ORANGE, weight="bold")
        left.text(2048, 0.07, "dashed: untied", ha="right", color=INK)

        right.plot(*curve(found, "equilibrium", PLAIN, "evaluations"), "o-", color=BLUE, lw=3)
        right.plot(*curve(found, "equilibrium", WINDOWS, "evaluations"), "^-", color=GREEN, lw=3)
        right.set(title="evaluations of f per bit", yscale="log")
        right.set_yticks([100, 1000], ["100", "1,000"])
        right.text(300, 900, "plain iteration", ha="right", color=BLUE, weight="bold")
        right.text(2048, 70, "windows", ha="right", color=GREEN, weight="bold")
        lengths = curve(found, "equilibrium", PLAIN, "exact")[0]
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.set(xlabel="bits in the string", xlim=(3.2, 2600))
        figure.savefig(file, dpi=130)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prefix_sums_compared.py",
        description=__doc__.partition("\n")[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=1, help="equilibria to train, at least 1")
    parser.add_argument("--stacked", type=int, default=0, help="of each stacked network to train")
    parser.add_argument(
        "--grads", type=int, default=0, help=f"to train with each of {' and '.join(OTHERS)}"
    )
    parser.add_argument("--steps", type=int, default=370)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures here")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the picture here")
    parser.add_argument(
        "--from", dest="found", metavar="FILE.json", help="train nothing: show what --out wrote"
    )
    args = parser.parse_args(argv)
    try:
        for name, least in {"seeds": 1, "stacked": 0, "grads": 0, "steps": 1}.items():
            check_count(f"--{name}", getattr(args, name), least)
        for file in filter(None, (args.out, args.figure)):
            check(file.parent.is_dir(), "the folder of a file to write", str(file), "there")
        if args.found:
            args.found = read(args.found)
    except (OSError, InputError) as error:
        parser.error(str(error))
    return args


def read(file: str) -> dict:
    """What --out wrote."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        names = {run["name"] for run in found["runs"]}
    except (ValueError, TypeError, KeyError):
        names = set()
    check("equilibrium" in names, "--from", file, "a file that --out wrote")
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    versions = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    found = args.found or {"machine": f"{date.today()}, {versions}", "runs": []}
    for run in found["runs"] if args.found else runs(args):
        show(run)
        if not args.found:
            found["runs"].append(run)
        if args.out:  # after each run: what is cut off keeps its figures
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
