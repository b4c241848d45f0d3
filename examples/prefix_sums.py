"""Train an equilibrium on prefix sums of at most 32 bits, then ask it for 2,048 and more.

    python examples/prefix_sums.py

Answer i is the parity of bits 0 to i. The layer f sees three neighbours, so one evaluation carries
a bit by one position, and n layers cannot carry it further than n positions. An equilibrium has no
depth: the solver goes on for as long as the string asks, and the residual says whether the answer
is there. prefix_sums_compared.py trains stacked networks as well, and draws a figure.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib import DEQ, DEQWarning, InputError
from lib.errors import check, check_count

GRAD = "phantom:steps=3,damping=1"  # the gradient of three last steps
TRAINED = 32  # bits in training, at most
PLAIN, WINDOWS = "plain iteration", "windows"  # two ways to solve
TESTS = [  # bits, strings
    (PLAIN, 32, 100), (PLAIN, 64, 100), (PLAIN, 128, 100), (PLAIN, 512, 20),
    (WINDOWS, 512, 20), (WINDOWS, 2048, 20), (WINDOWS, 8192, 5),
]  # fmt: skip


class Layer(nn.Module):
    """f(z, u) = n(W relu(V * z + u)), u = U * x + b; V, U see three neighbours, n is the RMS norm.

    f adds nothing to the old state, so a position repeats itself once its neighbours do.
    """

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.inject = nn.Conv1d(1, hidden, 3, padding=1)
        self.mix = nn.Conv1d(width, hidden, 3, padding=1, bias=False)
        self.out = nn.Conv1d(hidden, width, 1)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        z = self.out(torch.relu(self.mix(z) + u))  # (B, width, L)
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-5)


class PrefixSums(nn.Module):
    """Strings (B, 1, L) of -1 and 1 to logits (B, 2, L), read at the fixed point of one layer."""

    def __init__(self, grad: str = GRAD, width: int = 32):
        super().__init__()
        self.width, self.f, self.head = width, Layer(width), nn.Conv1d(width, 2, 1)
        self.deq = DEQ("fixed_point_iteration:eps=1e-5", grad=grad)

    def start(self, x: Tensor) -> Tensor:
        """A random state: in training, so that the fixed point does not depend on the start."""
        return torch.randn(len(x), self.width, x.shape[-1])

    def forward(self, x: Tensor, evaluations: int | None = None) -> Tensor:
        """Solve by plain iteration, with at most so many evaluations of f."""
        u, most = self.f.inject(x), evaluations or 2 * x.shape[-1] + 60
        return self.head(self.deq(lambda z: self.f(z, u), self.start(x), f_thres=most).z)

    def sweep(self, x: Tensor, window: int = 64, overlap: int = 16) -> Tensor:
        """Solve in windows from left to right, then the whole string from where they ended.

        Plain iteration evaluates all positions, although only those at the front still move: the
        work grows with the square of the length. A window costs the same wherever it lies. This is
        right because the last solve is that of the whole string, by the same f and tolerance: the
        windows only choose its start, and the residual is that of the whole string.
        """
        u, z = self.f.inject(x), self.start(x)
        for left in range(0, x.shape[-1], window):
            held, own = slice(max(0, left - 1), left), slice(left, left + window + overlap)
            seen = u[..., held.start : own.stop]

            def f(part: Tensor, fixed=z[..., held], seen=seen) -> Tensor:
                return self.f(torch.cat([fixed, part], -1), seen)[..., fixed.shape[-1] :]

            z[..., own] = self.deq(f, z[..., own], f_thres=4 * (window + overlap)).z
        return self.head(self.deq(lambda z: self.f(z, u), z, f_thres=2 * window + 60).z)


def strings(number: int, length: int) -> tuple[Tensor, Tensor]:
    """Random strings (number, 1, length) of -1 and 1, and their prefix sums modulo 2."""
    bits = torch.randint(2, (number, 1, length))
    return 2.0 * bits - 1, bits[:, 0].cumsum(1) % 2


def fit(model: nn.Module, steps: int) -> None:
    """Train on 64 strings per step, whose greatest length grows from 2 to 32 bits."""
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    for step in range(steps):
        longest = 2 + int((TRAINED - 2) * min(1, step / (0.7 * steps)))
        length = int(torch.randint(2, longest + 1, ()))
        x, y = strings(64, length)
        # As many evaluations as bits, and up to 8 more: an answer that is there has to stay.
        loss = cross_entropy(model(x, length + int(torch.randint(9, ()))), y)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()


def train(seed: int = 0, grad: str = GRAD, steps: int = 370) -> PrefixSums:
    """Train a new model.

    Raises:
        InputError: ``grad`` names no gradient, or ``steps`` is not a positive integer.
    """
    check_count("steps", steps)
    torch.manual_seed(seed)
    model = PrefixSums(grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DEQWarning)  # in training, solves are cut on purpose
        fit(model, steps)
    return model.eval()


def load(file: str | Path) -> PrefixSums:
    """Read a model that --save wrote."""
    model = PrefixSums()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@torch.no_grad()
def measure(model: PrefixSums, way: str, length: int, number: int) -> dict:
    """Solve random strings; return the share that is right in all bits, and what it took."""
    x, y = strings(number, length)
    positions = []  # of each evaluation of f
    counter = model.f.register_forward_hook(lambda f, args, z: positions.append(z.shape[-1]))
    started = time.perf_counter()
    answer = (model.sweep if way == WINDOWS else model)(x).argmax(1)
    counter.remove()
    return {
        "exact": (answer == y).all(1).double().mean().item(),
        "residual": model.deq.stats.forward.last["rel_residual"],  # of the last solve: the whole
        "evaluations": sum(positions) / length,  # per bit
        "seconds": time.perf_counter() - started,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="prefix_sums.py",
        description=__doc__.partition("\n")[0],
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=370, help="of training")
    parser.add_argument("--grad", default=GRAD, help="jfb, ift, ...")
    parser.add_argument("--longest", type=int, default=8192, help="bits in the tests, at most")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the weights here")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        check_count("--longest", args.longest, TRAINED)
        if args.save:
            check(args.save.parent.is_dir(), "--save", str(args.save), "in a folder that is there")
        model = train(args.seed, args.grad, args.steps)
    except InputError as error:
        parser.error(str(error))
    if args.save:
        torch.save(model.state_dict(), args.save)
    seconds = time.perf_counter() - started
    print(f"prefix sums: trained on at most {TRAINED} bits in {seconds:.0f} s")
    print("solved by          bits  exact  residual  evaluations per bit  seconds")
    for way, length, number in (test for test in TESTS if test[1] <= args.longest):
        found = measure(model, way, length, number)
        figures = "{exact:.3f}  {residual:8.1e}  {evaluations:19.0f}  {seconds:7.1f}"
        print(f"{way:15}  {length:6}  {figures.format(**found)}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
