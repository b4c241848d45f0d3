"""A learned start of the solver: z0 = h(u), from the words at each position and before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_sequence.linear import linear

STARTS = ("zero", "learned")
WIDTH = 8  # words that h sees, the position's own included
_NARROW = 4  # a word is held in d / 4 numbers for the positions to its right


class LearnedStart(nn.Module):
    """A linear guess of the fixed point from the last ``WIDTH`` words:

        h(u)_i = V [E u_(i-7); ...; E u_i] + S u_i + b

    u (d) is what a word adds to the values of the attention. The guess for a position depends on
    no later word. It costs a third of the products of an evaluation of f, or less, once per solve.

    h learns beside the model, by its distance to the state in which the solve ends (Bai, Koltun and
    Kolter 2022, Neural Deep Equilibrium Solvers). Neither u nor that state gets a gradient from it.
    At first h is 0, which is the start without it.
    """

    def __init__(self, d_model: int):
        super().__init__()
        narrow = max(1, d_model // _NARROW)
        with torch.random.fork_rng(devices=[]):  # the model's own weights are those without h
            reduce = torch.randn(narrow, d_model) / d_model**0.5
        self.reduce = nn.Parameter(reduce)  # E
        self.mix = nn.Parameter(torch.zeros(d_model, narrow * WIDTH))  # V
        self.own = nn.Parameter(torch.zeros(d_model, d_model))  # S
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, us: Tensor, qlen: int) -> Tensor:
        """The start (B, L, d) of the last ``qlen`` positions of the injections us (B, K, 3d)."""
        before, d = WIDTH - 1, len(self.bias)
        u = us.detach()[:, -(qlen + before) :, 2 * d :]
        y = linear(u, self.reduce)
        y = F.pad(y, (0, 0, qlen + before - y.shape[1], 0))  # zeros before the first word
        y = y.unfold(1, WIDTH, 1).flatten(2)  # (B, L, narrow * WIDTH)
        return linear(y, self.mix, self.bias) + linear(u[:, -qlen:], self.own)


def distance(guess: Tensor, z: Tensor) -> Tensor:
    """||guess - z||^2 / ||z||^2 over the batch, with a gradient for the guess alone."""
    z = z.detach()
    norm = z.square().sum().clamp_min(torch.finfo(z.dtype).tiny)  # z may be zero
    return (guess - z).square().sum() / norm
