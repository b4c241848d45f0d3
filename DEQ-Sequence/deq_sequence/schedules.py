"""Learning-rate schedules and optimisers."""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lib.errors import InputError
from lib.runs.checkpoint import check_form
from lib.runs.muon import Muon
from lib.runs.optimizers import fused_if_possible

# What ReduceLROnPlateau counts; its other attributes are settings.
_COUNTS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


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
        self.rate = args.lr  # of dev_perf, after the warm-up
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
            lr = self.rate
        else:
            lr = args.lr
        self._give(lr)
        return lr

    def _give(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def after_evaluation(self, loss: float, n: int) -> None:
        """Pass the validation loss after update ``n - 1`` to the schedule."""
        if self.plateau is not None and n > self.args.warmup_step:
            self._give(self.rate)  # of a run that goes on, the optimiser has none yet
            self.plateau.step(loss)
            self.rate = self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict:
        if self.plateau is None:
            return {}
        counts = {name: getattr(self.plateau, name) for name in _COUNTS}
        return counts | {"rate": self.rate, "lr": self.args.lr}

    def load_state_dict(self, state: dict) -> None:
        """Continue with the settings of this run: another --lr changes the rate by its factor.

        Raises:
            InputError: a part has another form than :meth:`state_dict` gives it.
        """
        if self.plateau is None or state == {}:  # no dev_perf now, or not before
            return
        own, name = self.state_dict(), "learning_rate"
        if isinstance(state, dict):
            if "rate" not in state:  # older checkpoints
                last = state.get("_last_lr")
                check_form(last, [0.0], f"{name}['_last_lr']")
                state = state | {"rate": last[0], "lr": self.args.lr}
            state = {key: state.get(key) for key in own}
        check_form(state, own, name)
        if not (state["lr"] > 0 and state["rate"] >= 0):
            raise InputError(f"{name} holds a rate that is not positive: use another checkpoint")
        for key in _COUNTS:
            setattr(self.plateau, key, state[key])
        # Multiplied by 1 exactly, if --lr is the same.
        rate = state["rate"] * (self.args.lr / state["lr"])
        self.rate = max(rate, min(self.args.lr_min, self.args.lr))
