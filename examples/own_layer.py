"""Train an equilibrium layer of one's own on scikit-learn's digits, against logistic regression.

python examples/own_layer.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lib import DEQ, power_method, spectral_norm


class OwnLayer(nn.Module):
    """The fixed point of f(z) = tanh(W z + U x + b), and a linear head."""

    def __init__(self):
        super().__init__()
        self.inject = nn.Linear(64, 64)
        self.mix = spectral_norm(nn.Linear(64, 64, bias=False), bound=0.9)  # so that f settles
        self.head = nn.Linear(64, 10)
        self.deq = DEQ()

    def f(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.mix(z) + u)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)  # does not depend on z: computed once
        return self.head(self.deq(lambda z: self.f(z, u), torch.zeros_like(u)).z)


def main(argv: list[str] | None = None) -> float:
    """Print the figures of one training; return the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = slice(1297), slice(1297, None)

    model = OwnLayer()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(args.steps):
        rows = torch.randint(1297, (128,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1)
        adam.zero_grad()
        loss.backward()
        adam.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(x[1297:]).argmax(1) == y[1297:]).double().mean().item()
        u = model.inject(x[test])
    solve = model.deq.stats.forward.last
    z = model.deq(lambda z: model.f(z, u), torch.zeros_like(u)).z_star.requires_grad_()
    radius = power_method(model.f(z, u), z)[1].max().item()
    regression = LogisticRegression(max_iter=1000).fit(x[train], y[train])
    print(f"test accuracy          {accuracy:.3f}")
    print(f"logistic regression    {regression.score(x[test], y[test]):.3f}")
    print(f"relative residual      {solve['rel_residual']:.1e}")
    print(f"evaluations of f       {solve['nfe']}")
    print(f"largest radius         {radius:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
