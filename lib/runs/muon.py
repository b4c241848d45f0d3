"""Muon: steps of orthogonalised momentum for matrices (Jordan et al. 2024; arXiv 2502.16982)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of a step x -> a x + b x x'x + c x (x'x)^2 (Jordan et al. 2024,
# https://kellerjordan.github.io/posts/muon/). Five steps bring singular values between 0.01 and 1
# to values between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Muon for ``matrices``, and AdamW for all other parameters.

    For a gradient g of a matrix W (n, m), with m1 the running mean of its gradients:

        m1 <- 0.95 m1 + 0.05 g
        U S V' = 0.95 m1 + 0.05 g
        W <- (1 - lr decay) W - 0.2 sqrt(max(n, m)) lr U V'

    All directions of a matrix thus move by the same amount. The factor gives the update the size
    that one of AdamW has, so that both share a learning rate (arXiv 2502.16982). U V' is computed
    approximately, by matrix products in float32. ``torch.optim.Muon`` rounds to bfloat16, which is
    40 times slower on a CPU without such instructions, and refuses kernels of size 1.

    Args:
        params: all parameters, or groups of them, as for AdamW.
        matrices: those of ``params`` that Muon updates; a kernel (n, m, h, w) counts as (n, m h w).
        options: ``lr``, ``weight_decay`` and others of AdamW.
    """

    def __init__(self, params, matrices: Iterable[nn.Parameter] = (), **options):
        own, groups = {id(p) for p in matrices}, list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        super().__init__([part for g in groups for part in _parted(g, own)], **options)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        updated = []
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"])
                    updated.append((p, p.grad))
                    p.grad = None  # AdamW leaves out what has no gradient
        super().step()
        for p, gradient in updated:
            p.grad = gradient

    def _update(self, p: nn.Parameter, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[p]
        if not state:
            # AdamW's names: it looks for ``step`` in every state that it loads.
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(mean, _MOMENTUM).flatten(1)
        scale = 0.2 * max(matrix.shape) ** 0.5
        p.mul_(1 - lr * decay)
        p.sub_(orthogonal(matrix).view_as(p), alpha=lr * scale)


def _parted(group: dict, matrices: set[int]) -> list[dict]:
    """The group as two: matrices and other parameters. ``orthogonal`` tells which they are."""
    if "orthogonal" in group:
        return [group]
    parts = [
        {"params": [p for p in group["params"] if (id(p) in matrices) is own], "orthogonal": own}
        for own in (True, False)
    ]
    return [group | part for part in parts if part["params"]]


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate U V' of a matrix (n, m) with singular value decomposition U S V'.

    The singular values of the result lie between about 0.7 and 1.2, except where those of
    ``matrix`` are below a hundredth of its Frobenius norm.
    """
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    wide = len(x) <= x.shape[1]
    x = x if wide else x.t()
    for _ in range(_STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x if wide else x.t()).to(matrix.dtype)
