"""Optimiser, learning rate and weight of the Jacobian loss, from the configuration."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from yacs.config import CfgNode

from lib.jacobian import jac_loss_weight_at
from lib.runs.muon import Muon
from lib.runs.optimizers import fused_if_possible
from mdeq_vision.start import PREFIX

ETA_MIN = 1e-6  # final learning rate of the cosine schedule
POLY_POWER = 0.9
OPTIMIZERS = ("adam", "muon", "sgd", "rmsprop")  # values of TRAIN.OPTIMIZER


def make_optimizer(
    cfg: CfgNode, model: nn.Module, build: Callable = fused_if_possible
) -> torch.optim.Optimizer:
    """Build the optimiser that TRAIN.OPTIMIZER names."""
    train = cfg.TRAIN
    options = {"lr": train.LR, "weight_decay": train.WD}
    if train.OPTIMIZER == "adam":
        return build(torch.optim.Adam, model, **options)
    if train.OPTIMIZER == "muon":
        return build(partial(Muon, matrices=_kernels(model)), model, **options)
    options["momentum"] = train.MOMENTUM
    if train.OPTIMIZER == "sgd":
        return build(torch.optim.SGD, model, nesterov=train.NESTEROV, **options)
    return build(torch.optim.RMSprop, model, **options)


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    """The kernels of the convolutions, for Muon; not those of the start and of the last layer."""
    return [
        p
        for name, p in model.named_parameters()
        if p.dim() == 4
        and name.endswith(("weight", "weight_v"))
        and not name.startswith((PREFIX, "last_layer."))
    ]


def learning_rate(
    cfg: CfgNode, step: int, steps_per_epoch: int, extra_steps_per_epoch: int = 0
) -> float:
    """The learning rate of update ``step`` (from 0).

    With update n, T = END_EPOCH * steps_per_epoch updates, and e the epoch of update n:

        cosine   eta_min + (LR - eta_min) (1 + cos(pi n / T)) / 2, eta_min = 1e-6
        poly     LR (1 - n / T)^0.9
        step     LR * LR_FACTOR^k, k the number of entries of LR_STEP that are <= e

    If EXTRA_EPOCH > 0, the schedule begins again after T updates: from EXTRA_LR, with n and e
    counted from there, over EXTRA_EPOCH epochs of ``extra_steps_per_epoch`` updates.

    The rate depends on the step alone, so a resumed run needs no state.
    """
    train = cfg.TRAIN
    rate, epochs = train.LR, train.END_EPOCH
    if train.EXTRA_EPOCH > 0 and step >= epochs * steps_per_epoch:
        step -= epochs * steps_per_epoch
        rate, epochs, steps_per_epoch = train.EXTRA_LR, train.EXTRA_EPOCH, extra_steps_per_epoch
    progress = min(step / max(epochs * steps_per_epoch, 1), 1.0)
    if train.LR_SCHEDULER == "cosine":
        return ETA_MIN + (rate - ETA_MIN) * (1 + math.cos(math.pi * progress)) / 2
    if train.LR_SCHEDULER == "poly":
        return rate * (1 - progress) ** POLY_POWER
    passed = sum(epoch <= step // steps_per_epoch for epoch in train.LR_STEP)
    return rate * train.LR_FACTOR**passed


def jac_factor(cfg: CfgNode, step: int, epoch: int) -> float:
    """The weight of the Jacobian loss in update ``step``, which lies in ``epoch``; both from 0.

    - Stacked phase: PRETRAIN_JAC_LOSS_WEIGHT.
    - Equilibrium phase: JAC_LOSS_WEIGHT, plus 0.1 for every JAC_INCREMENTAL steps in this phase;
      0 from epoch JAC_STOP_EPOCH on.
    """
    loss = cfg.LOSS
    if step < cfg.TRAIN.PRETRAIN_STEPS:
        return loss.PRETRAIN_JAC_LOSS_WEIGHT
    if epoch >= loss.JAC_STOP_EPOCH:
        return 0.0
    return jac_loss_weight_at(
        step,
        loss.JAC_LOSS_WEIGHT,
        loss.JAC_INCREMENTAL,
        cfg.TRAIN.PRETRAIN_STEPS,
        from_start=True,
    )
