"""A learned start of the solver: z0 = h(u), from the words at each position and before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_sequence.linear import linear

STARTS = ("zero", "learned")
WIDTH = 8  # words that h sees, the position's own included


class LearnedStart(nn.Module):
    """h(u) = V gelu(c * (W u)) + S u + b, a guess of the fixed point (B, L, d).

    c * is a causal convolution over the last ``WIDTH`` positions, for each channel by itself. So
    z0 of a position depends on its word and on earlier words alone. It costs about half of the
    products of an evaluation's attention block, once per solve.

    h learns beside the model, by its distance to the solved state (Bai, Koltun and Kolter 2022,
    Neural Deep Equilibrium Solvers): neither its input nor its target gets a gradient. At first
    h(u) = 0, which is the start without h.
    """

    def __init__(self, d_model: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the model's own weights are those without h
            inner = torch.randn(d_model, 3 * d_model) / (3 * d_model) ** 0.5
            mix = torch.randn(d_model, 1, WIDTH) / WIDTH**0.5
        self.inner, self.mix = nn.Parameter(inner), nn.Parameter(mix)
        self.out = nn.Parameter(torch.zeros(d_model, d_model))
        self.skip = nn.Parameter(torch.zeros(d_model, 3 * d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, us: Tensor, qlen: int) -> Tensor:
        """The start (B, L, d) of the last ``qlen`` positions of the injections us (B, K, 3d)."""
        before = WIDTH - 1
        us = us.detach()[:, -(qlen + before) :]
        y = linear(us, self.inner).transpose(1, 2)  # (B, d, at most L + before)
        y = F.pad(y, (qlen + before - y.shape[2], 0))  # zeros before the first word
        y = F.conv1d(y, self.mix, groups=len(self.mix)).transpose(1, 2)  # (B, L, d)
        return linear(F.gelu(y), self.out, self.bias) + linear(us[:, -qlen:], self.skip)


def distance(guess: Tensor, z: Tensor) -> Tensor:
    """||guess - z||^2 / ||z||^2 over the batch, with a gradient for the guess alone."""
    z = z.detach()
    return (guess - z).square().sum() / z.square().sum()
