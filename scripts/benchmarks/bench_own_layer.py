"""What should a first layer of one's own be? Several layers, trained with all defaults.

    python scripts/benchmarks/bench_own_layer.py --json docs/data/own_layer.json
    python scripts/benchmarks/bench_own_layer.py --only naive "spectral 0.9" --seeds 2

The data are scikit-learn's digits, divided by 16: the first 1297 for training, the last 500 for
testing. The width is 64. Adam with a rate of 3e-3 makes 300 steps of 128 samples, on one thread of
the CPU, whatever --device says. A row has, over the seeds:

- the test accuracy: mean, lowest, highest;
- on the test set after training: the relative residual, the evaluations of f, and the spectral
  radius at the fixed points (its mean and its largest over the samples, each as a mean over seeds);
- the evaluations in a training step, of the forward and of the backward solve;
- the CPU seconds of a training;
- in how many runs a warning spoke of the radius.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lib import DEQ, ContractiveLayer, power_method, spectral_norm, weight_norm_all
from lib.runs.command_line import exit_code

WIDTH, STEPS, BATCH, TRAIN, RATE = 64, 300, 128, 1297, 3e-3


class Layer(nn.Module):
    """f(z) = activation(W z + U x + b), with W changed by ``hold``."""

    def __init__(self, activation: Callable, hold: Callable, factor: float = 1.0, norm=False):
        super().__init__()
        self.inject, self.mix = nn.Linear(64, WIDTH), hold(nn.Linear(WIDTH, WIDTH, bias=False))
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.activation, self.factor = activation, factor

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.activation(self.factor * self.norm(self.mix(z)) + u)


class Monotone(nn.Module):
    """W = (1 - m) I - A'A + B - B' (Winston and Kolter 2020, arXiv 2006.08591), m = 0.1.

    I - W is strongly monotone, so the fixed point is unique for each activation that is a proximal
    operator, such as tanh. f itself need not contract.
    """

    def __init__(self):
        super().__init__()
        self.inject = nn.Linear(64, WIDTH)
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 16) for _ in range(2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        back = 0.9 * z - (z @ self.a.t()) @ self.a + z @ (self.b - self.b.t())
        return torch.tanh(back + u)


def plain(layer: nn.Module) -> nn.Module:
    return layer


def scaled_to(bound: float) -> Callable[[nn.Module], nn.Module]:
    """A norm that equals the bound: the weight is also made larger."""

    def hold(layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight.mul_(1e3)  # a bounded weight this large stays at its bound
        return spectral_norm(layer, bound)

    return hold


# Name: the formula, the layer, and the weight of the Jacobian loss.
LAYERS: dict[str, tuple[str, Callable[[], nn.Module], float]] = {
    "naive": ("tanh(LayerNorm(W z) + u)", lambda: Layer(torch.tanh, plain, norm=True), 0.0),
    "half": ("tanh(W z / 2 + u)", lambda: Layer(torch.tanh, plain, factor=0.5), 0.0),
    "weight norm": (
        "tanh(LayerNorm(W z) + u), weight norm",
        lambda: Layer(torch.tanh, weight_norm_all, norm=True),
        0.0,
    ),
    "half, jacobian 0.3": (
        "tanh(W z / 2 + u), 0.3 Jacobian loss",
        lambda: Layer(torch.tanh, plain, factor=0.5),
        0.3,
    ),
    "naive, jacobian 3": (
        "tanh(LayerNorm(W z) + u), 3 Jacobian loss",
        lambda: Layer(torch.tanh, plain, norm=True),
        3.0,
    ),
    **{
        f"spectral {bound}": (
            f"tanh(W z + u), norm of W at most {bound} (ContractiveLayer)",
            partial(ContractiveLayer, 64, WIDTH, bound),
            0.0,
        )
        for bound in (0.8, 0.9, 0.95, 0.99)
    },
    "spectral = 0.9": (
        "tanh(W z + u), norm of W equal to 0.9",
        lambda: Layer(torch.tanh, scaled_to(0.9)),
        0.0,
    ),
    "monotone": ("tanh(W z + u), monotone W (Winston and Kolter 2020)", Monotone, 0.0),
}


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [0, 1], and their digits."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def logistic_regression() -> float:
    """The test accuracy of scikit-learn's logistic regression."""
    x, y = digits()
    model = LogisticRegression(max_iter=1000).fit(x[:TRAIN], y[:TRAIN])
    return float(model.score(x[TRAIN:], y[TRAIN:]))


def train(name: str, seed: int) -> dict:
    """The figures of one training."""
    torch.manual_seed(seed)
    x, y = digits()
    _, make, jac_weight = LAYERS[name]
    layer, head, deq = make(), nn.Linear(WIDTH, 10), DEQ()
    adam = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=RATE)
    start = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            rows = torch.randint(TRAIN, (BATCH,))
            u = layer.inject(x[rows])
            found = deq(
                lambda z, u=u: layer(z, u),
                torch.zeros_like(u),
                jac_vecs=1 if jac_weight else 0,
            )
            loss = nn.functional.cross_entropy(head(found.z), y[rows])
            adam.zero_grad()
            (loss + jac_weight * found.jac_loss).backward()
            adam.step()
    seconds = time.process_time() - start
    passes = deq.stats.forward.means(), deq.stats.backward.means()
    layer.eval()
    with torch.no_grad():
        u = layer.inject(x[TRAIN:])
        found = deq(lambda z: layer(z, u), torch.zeros_like(u), training=False)
        accuracy = (head(found.z).argmax(1) == y[TRAIN:]).double().mean().item()
    point = found.z_star.clone().requires_grad_()
    radius = power_method(layer(point, u.detach()), point)[1]
    return {
        "accuracy": accuracy,
        "residual": deq.stats.forward.last["rel_residual"],
        "evaluations": deq.stats.forward.last["nfe"],
        "training_evaluations": [figures["nfe"] for figures in passes],
        "training_residual": passes[0]["rel_residual"],
        "radius": radius.mean().item(),
        "largest_radius": radius.max().item(),
        "seconds": seconds,
        "warned": any("spectral radius" in str(w.message) for w in said),
    }


def row(name: str, runs: list[dict]) -> list[str]:
    """The table row of one layer."""

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    accuracies = [run["accuracy"] for run in runs]
    each = [
        statistics.fmean(side)
        for side in zip(*(r["training_evaluations"] for r in runs), strict=True)
    ]
    return [
        LAYERS[name][0],
        f"{mean('accuracy'):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})",
        f"{mean('residual'):.1e}",
        f"{mean('evaluations'):.0f}",
        f"{each[0]:.1f} + {each[1]:.1f}",
        f"{mean('radius'):.2f}, {mean('largest_radius'):.2f}",
        f"{mean('seconds'):.1f}",
        f"{sum(run['warned'] for run in runs)} of {len(runs)}",
    ]


HEAD = ["f", "test accuracy", "residual", "evaluations", "training: forward + backward",
        "radius: mean, largest", "CPU seconds", "warned"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_own_layer.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = __doc__.split("\n\n")[0]
    parser = Parser(prog="bench_own_layer.py", description=description, least={"seeds": 1})
    parser.add_argument("--seeds", type=int, default=5, help="trainings per layer")
    names = ", ".join(repr(name) for name in LAYERS)
    parser.add_argument(
        "--only", nargs="+", choices=list(LAYERS), default=list(LAYERS), metavar="LAYER",
        help=f"the layers to train, of {names}",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    machine, regression = describe_machine(torch.device("cpu")), logistic_regression()
    print(machine + "\n", flush=True)
    runs, rows = {}, [["logistic regression", f"{regression:.3f}", *["-"] * (len(HEAD) - 2)]]
    for name in args.only:
        runs[name] = [train(name, seed) for seed in range(args.seeds)]
        rows.append(row(name, runs[name]))
        print(f"{name}: {', '.join(rows[-1][1:])}", file=sys.stderr, flush=True)
        figures = {
            "machine": machine,
            "logistic_regression": regression,
            "table": {"head": HEAD, "rows": rows},
            "runs": runs,
        }
        write_json(args.json, figures)  # each time: an interrupted benchmark keeps its figures
    print(table(HEAD, rows))


if __name__ == "__main__":
    sys.exit(main())
