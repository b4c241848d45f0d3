"""Learning rates and optimisers."""

import argparse
import math

import torch
from torch import nn


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``--optim`` with PyTorch's defaults for all but rate and decay.

    It is fused, one kernel for the whole update, where PyTorch has that for the parameters'
    device (Adam at 29 million parameters, one CPU thread: 14 ms instead of 119).
    """
    kind, parameters = getattr(torch.optim, args.optim), list(model.parameters())
    fused = {"fused": True} if _has_fused(kind, parameters[0]) else {}
    return kind(parameters, lr=args.lr, weight_decay=args.weight_decay, **fused)


def _has_fused(kind: type[torch.optim.Optimizer], like: torch.Tensor) -> bool:
    """Whether an update of a parameter like ``like`` can be fused: found out by doing one."""
    parameter = nn.Parameter(like.new_zeros(1))
    parameter.grad = torch.zeros_like(parameter)
    try:
        kind([parameter], lr=0.1, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; not on this device
        return False
    return True


def with_own_kernels(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A saved optimiser state whose updates are computed as those of ``optimizer``.

    Which kernels there are is a matter of this machine, not of the one that saved the state.
    """
    own = {name: optimizer.defaults[name] for name in ("fused",) if name in optimizer.defaults}
    return state | {"param_groups": [group | own for group in state["param_groups"]]}


class LearningRate:
    """Linear warm-up from the first update, then the schedule.

    With n the index of the update (from 0), w ``warmup_step`` and T ``max_step``:

        n < w       lr (n + 1) / w
        cosine      eta_min + (lr - eta_min) (1 + cos(pi n / T)) / 2
        inv_sqrt    lr sqrt(max(w, 1) / (n + 1))
        constant    lr
        dev_perf    lr times decay_rate after ``patience`` evaluations without gain
    """

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer):
        self.args, self.optimizer = args, optimizer
        self.plateau = None
        if args.scheduler == "dev_perf":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=args.decay_rate, patience=args.patience, min_lr=args.lr_min
            )

    def set(self, n: int) -> float:
        """Set the rate of update ``n`` and return it."""
        args = self.args
        if n < args.warmup_step:
            lr = args.lr * (n + 1) / args.warmup_step
        elif args.scheduler == "cosine":
            progress = min(n / max(args.max_step, 1), 1.0)
            lr = args.eta_min + (args.lr - args.eta_min) * (1 + math.cos(math.pi * progress)) / 2
        elif args.scheduler == "inv_sqrt":
            lr = args.lr * math.sqrt(max(args.warmup_step, 1) / (n + 1))
        elif args.scheduler == "dev_perf":
            # The plateau scheduler owns the rate, once the warm-up has handed it over.
            lr = args.lr if n == args.warmup_step else self.optimizer.param_groups[0]["lr"]
        else:
            lr = args.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def after_evaluation(self, loss: float, n: int) -> None:
        """Tell the schedule a validation loss, after update ``n - 1``."""
        if self.plateau is not None and n > self.args.warmup_step:
            self.plateau.step(loss)

    def state_dict(self) -> dict:
        return {} if self.plateau is None else self.plateau.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.plateau is not None:
            self.plateau.load_state_dict(state)
