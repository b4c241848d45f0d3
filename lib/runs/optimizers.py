"""Optimisers: fused where PyTorch can, gradient clipping, the state after a resume."""

from collections import Counter

import torch
from torch import Tensor, nn

from lib.errors import InputError
from lib.runs.checkpoint import check_form


def fused_if_possible(
    kind: type[torch.optim.Optimizer], model: nn.Module, **options
) -> torch.optim.Optimizer:
    """Build an optimiser of all parameters, fused if PyTorch supports this on their device.

    A fused optimiser does its update in one kernel (Adam, 29 million parameters, one CPU thread:
    14 ms instead of 119).
    """
    parameters = list(model.parameters())
    groups = _groups(parameters)
    # A trial update shows whether fused ones are supported.
    probe = nn.Parameter(parameters[0].detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=0.1, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; not on this device
        return kind(groups, **options)
    return kind(groups, fused=True, **options)


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Groups in which no two parameters share memory.

    One kernel may update a whole group: of two updates of one memory one would be lost.
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


def clip_gradients(model: nn.Module, clipped: list[nn.Parameter], limit: float) -> Tensor:
    """Clip the norm of the gradients of ``clipped`` to ``limit``, if that is above 0.

    The norm of all gradients of the model before it is returned, 0-dim.
    """
    norms, done = [], set()
    if limit > 0:
        norms = [nn.utils.clip_grad_norm_(clipped, limit)]
        done = {id(p) for p in clipped}
    norms += [
        torch.linalg.vector_norm(p.grad)
        for p in model.parameters()
        if p.grad is not None and id(p) not in done
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's state. Its options stay its own: settings may change on a resume.

    Raises:
        InputError: a part of the state has another form than this optimiser's.
    """
    groups = optimizer.state_dict()["param_groups"]
    check_form(state, {"state": ..., "param_groups": [...] * len(groups)}, "optimizer")
    for number, (own, saved) in enumerate(zip(groups, state["param_groups"], strict=True)):
        name = f"optimizer group {number}"
        saved = {"params": saved.get("params")} if isinstance(saved, dict) else saved
        check_form(saved, {"params": own["params"]}, name)
        if list(saved["params"]) != own["params"]:
            raise InputError(f"{name} has other parameters than this run: use another checkpoint")
    forms, saved = _forms(optimizer), state["state"]
    if not isinstance(saved, dict) or not saved.keys() <= forms.keys():
        raise InputError("optimizer has a state for other parameters: use another checkpoint")
    fitted = {}
    for index, values in saved.items():
        check_form(values, forms[index], f"optimizer state {index}")
        # Copies with the strides of the parameter, which a fused kernel expects.
        fitted[index] = {k: torch.empty_like(forms[index][k]).copy_(v) for k, v in values.items()}
    optimizer.load_state_dict({"state": fitted, "param_groups": groups})


def _forms(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """By the number of each parameter: tensors of the form that its state will have.

    A step of a stand-in with small parameters shows what the state consists of.
    """
    probes = {
        p: nn.Parameter(p.detach().new_zeros(2, 2))
        for g in optimizer.param_groups
        for p in g["params"]
    }
    stand_in = type(optimizer)(
        [g | {"params": [probes[p] for p in g["params"]]} for g in optimizer.param_groups]
    )
    for probe in probes.values():
        probe.grad = torch.zeros_like(probe)
    stand_in.step()
    return {
        number: {
            name: parameter.detach() if value.shape == probe.shape else value
            for name, value in stand_in.state[probe].items()
        }
        for number, (parameter, probe) in enumerate(probes.items())
    }
