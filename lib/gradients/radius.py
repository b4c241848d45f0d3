"""Notice that training has passed a spectral radius of one."""

from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor

from lib.gradients.adjoint import warn

EVERY, PRODUCTS = 100, 20  # 20 products per 100 backward passes: 0.2 per step


class RadiusWatch:
    """Warns once if the spectral radius of J = df/dz at z* exceeds one in training.

    The radius is the largest over the samples of a batch: a batch is solved when all its samples
    are, and a few unstable samples are enough to stop solves early.

    At every 100th backward pass, 20 products with J' start from the incoming gradient. The growth
    of the last 10 estimates the spectral radius per sample, without random numbers. The estimate
    never exceeds ||J||_2, so a contraction stays silent. It is rough if many eigenvalues have
    nearly the largest modulus, or if J is far from normal; :func:`lib.jacobian.power_method` is
    more exact.

    There is no estimate if several processes train together: their backward passes may
    communicate, and the estimate would have to run in all of them alike.
    """

    def __init__(self):
        self.passes, self.said = 0, False

    def __call__(self, product: Callable[[Tensor], Tensor], grad: Tensor) -> None:
        """Count one backward pass; ``product`` is v -> J'v, ``grad`` the incoming gradient."""
        self.passes += 1
        if self.said or self.passes % EVERY or grad.is_meta or _several_processes():
            return
        radius = growth(product, grad)
        if radius > 1:
            self.said = True
            warn(
                f"the spectral radius of df/dz has passed one: it is about {radius:.2f} (the "
                f"largest of a batch, at backward pass {self.passes}). Plain iteration then leaves "
                "the fixed point, and solves may stop early: bound the weights "
                "(lib.spectral_norm) or train with the Jacobian loss (jac_vecs); this is said once"
            )


@torch.no_grad()
def growth(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """The growth per product over the last half of the products, the largest of the samples.

    ``start`` is (B, ...). A sample whose start is zero counts as 0; NaN if a product is not finite.
    """
    shape = (-1, *[1] * (start.dim() - 1))
    dtype = torch.promote_types(start.dtype, torch.float32)
    smallest = torch.finfo(dtype).tiny

    def norms(vectors: Tensor) -> Tensor:
        return torch.linalg.vector_norm(vectors.flatten(1).to(dtype), dim=1)

    norm = norms(start)
    v, logs = start, torch.zeros_like(norm)
    for i in range(PRODUCTS):
        v = product((v / norm.clamp(min=smallest).view(shape)).to(start.dtype))
        norm = norms(v)
        if i >= PRODUCTS // 2:
            logs += norm.clamp(min=smallest).log()
    return (logs / (PRODUCTS - PRODUCTS // 2)).exp().amax().item()


def _several_processes() -> bool:
    found = torch.distributed
    return found.is_available() and found.is_initialized() and found.get_world_size() > 1
