"""DEQ.F_START learned: a small network predicts z*, and the solver begins there instead of at zero.

After "Neural Deep Equilibrium Solvers" (Bai, Koltun and Kolter, ICLR 2022), whose solver begins at
a learned guess too. The equation z = f(z; x) stays as it is, and so does its fixed point: a good
guess saves evaluations of f, a bad one costs some.

The guess p is trained beside the model by its own loss, the relative distance to the state z that
the forward pass found:

    sum_i ||p_i - z_i||^2 / sum_i ||z_i||^2          (over the branches i and the batch)

z and the injection are detached in it: this loss changes no other parameter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.layer_utils import conv3x3

STARTS = ("zero", "learned")  # values of DEQ.F_START
PREFIX = "start."  # of the names of its parameters in the model


class Start(nn.Module):
    """Per branch: the injection, averaged to the branch's size, through two 3x3 convolutions.

    At first all guesses are zero. Making it changes no random number drawn later.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        width = channels[0]
        with torch.random.fork_rng(devices=[]):
            self.branches = nn.ModuleList(
                nn.Sequential(
                    conv3x3(width, width, bias=True), nn.ReLU(), conv3x3(width, out, bias=True)
                )
                for out in channels
            )
        for branch in self.branches:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)

    def forward(self, injection: Tensor, z0: list[Tensor]) -> list[Tensor]:
        """The guess from the injection (B, C_0, H, W), in the shapes and dtype of ``z0``."""
        injection = injection.detach()
        return [
            branch(F.adaptive_avg_pool2d(injection, z_i.shape[-2:])).to(z_i.dtype)
            for branch, z_i in zip(self.branches, z0, strict=True)
        ]


def distance(guess: list[Tensor], found: list[Tensor]) -> Tensor:
    """The loss of a guess, 0-dim; its gradient goes to the guess alone."""
    pairs = [(p, z.detach()) for p, z in zip(guess, found, strict=True)]
    norm = sum(z.square().sum() for _, z in pairs)
    error = sum((p - z).square().sum() for p, z in pairs)
    return error / norm.clamp_min(torch.finfo(norm.dtype).tiny)


class WithLoss(torch.autograd.Function):
    """``WithLoss.apply(output, loss)`` is ``output``; its backward adds the gradient of ``loss``.

    So a loss of the model's own needs no change of the trainer, and also works in parallel copies
    of the model.
    """

    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grad, one
