"""Optimisers: fused ones where PyTorch has them, and their state after a resume."""

from collections import Counter

import torch
from torch import nn


def fused_if_possible(
    kind: type[torch.optim.Optimizer], model: nn.Module, **options
) -> torch.optim.Optimizer:
    """Build an optimiser of all parameters, fused if PyTorch supports this on their device.

    A fused optimiser does the whole update in one kernel (Adam, 29 million parameters, one CPU
    thread: 14 ms instead of 119).
    """
    parameters = list(model.parameters())
    groups = _groups(parameters)
    # A trial update finds out whether fused updates are supported.
    probe = nn.Parameter(parameters[0].detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=0.1, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; not on this device
        return kind(groups, **options)
    return kind(groups, fused=True, **options)


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Split parameters into groups in which no two share memory.

    One kernel may update a whole group: of two updates of the same memory one would be lost.
    """
    groups: list[dict] = []
    seen: Counter = Counter()
    for parameter in parameters:
        place = parameter.untyped_storage()._cdata, parameter.storage_offset()
        if seen[place] == len(groups):
            groups.append({"params": []})
        groups[seen[place]]["params"].append(parameter)
        seen[place] += 1
    return groups


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, weight_decay: float) -> None:
    """Load an optimiser's state, except for two options.

    The weight decay is the argument, because settings may change on a resume. ``fused`` stays as
    this optimiser has it, because it depends on this machine, not on the one that saved.
    """
    own = {name: optimizer.defaults[name] for name in ("fused",) if name in optimizer.defaults}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group |= own | {"weight_decay": weight_decay}
