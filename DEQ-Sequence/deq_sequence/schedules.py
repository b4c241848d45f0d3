"""Learning-rate schedules and optimisers."""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from deq_sequence.muon import Muon
from lib.runs.optimizers import fused_if_possible


def make_optimizer(
    args: argparse.Namespace, model: nn.Module, build: Callable = fused_if_possible
) -> torch.optim.Optimizer:
    """The optimiser ``--optim``, with its defaults except for learning rate and decay."""
    own = args.optim == "Muon"  # not that of torch.optim: see the class
    kind = partial(Muon, matrices=_matrices(model)) if own else getattr(torch.optim, args.optim)
    return build(kind, model, lr=args.lr, weight_decay=args.weight_decay)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the layer and of its injection, for Muon; not tables and projections."""
    return [
        p
        for name, p in model.named_parameters()
        if name.startswith(("func.", "inject_conv.")) and name.endswith(("weight", "weight_v"))
    ]


class LearningRate:
    """Learning rate: linear warm-up from the first update, then the schedule ``--scheduler``.

    With n the index of the update (from 0), w ``warmup_step`` and T ``max_step``:

        n < w       lr (n + 1) / w
        cosine      eta_min + (lr - eta_min) (1 + cos(pi n / T)) / 2
        inv_sqrt    lr sqrt(max(w, 1) / (n + 1))
        constant    lr
        dev_perf    lr times decay_rate after more than ``patience`` evaluations without gain
    """

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer):
        self.args, self.optimizer = args, optimizer
        self.plateau = None
        if args.scheduler == "dev_perf":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=args.decay_rate, patience=args.patience, min_lr=args.lr_min
            )

    def set(self, n: int) -> float:
        """Set and return the learning rate of update ``n``."""
        args = self.args
        if n < args.warmup_step:
            lr = args.lr * (n + 1) / args.warmup_step
        elif args.scheduler == "cosine":
            progress = min(n / max(args.max_step, 1), 1.0)
            lr = args.eta_min + (args.lr - args.eta_min) * (1 + math.cos(math.pi * progress)) / 2
        elif args.scheduler == "inv_sqrt":
            lr = args.lr * math.sqrt(max(args.warmup_step, 1) / (n + 1))
        elif args.scheduler == "dev_perf":
            # After the warm-up, self.plateau controls the rate.
            lr = args.lr if n == args.warmup_step else self.optimizer.param_groups[0]["lr"]
        else:
            lr = args.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def after_evaluation(self, loss: float, n: int) -> None:
        """Pass the validation loss after update ``n - 1`` to the schedule."""
        if self.plateau is not None and n > self.args.warmup_step:
            self.plateau.step(loss)

    def state_dict(self) -> dict:
        return {} if self.plateau is None else self.plateau.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.plateau is not None:
            self.plateau.load_state_dict(state)
