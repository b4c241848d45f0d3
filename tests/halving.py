"""f(z) = z / 2 + x at x = 1, by every gradient: z* = 2 and dz*/dx = 2."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lib.deq import DEQ, Equilibrium

TIGHT = "broyden:eps=1e-13"
# Each gradient, and what it makes of dz*/dx.
EXACT = {
    "ift": 2.0,
    "shine:limit=100": 2.0,
    "phantom:steps=60,form=neumann,damping=1": 2.0,
    "phantom:steps=60,damping=1": 2.0,
    "jfb": 1.0,
    "unroll": 2.0,
    "reversible:damping=0.6": 2.0,
}
by_grad = pytest.mark.parametrize("grad", EXACT)
# Wrong ones are off by 1 and more; 24 coupled steps, the slowest to converge, leave 4e-5.
NEAR = {"rtol": 1e-4, "atol": 0}
double = partial(torch.full, dtype=torch.float64)


def solve(grad: str = "ift", x: Tensor | None = None, **options) -> tuple[Equilibrium, Tensor]:
    x = double((1, 3), 1.0, requires_grad=True) if x is None else x
    deq = DEQ(TIGHT, TIGHT, grad=grad)
    return deq(lambda z: 0.5 * z + x, double((1, 3), 0.0), f_thres=48, **options), x


def assert_equal(found: Tensor, value: float) -> None:
    torch.testing.assert_close(found, torch.full_like(found, value), **NEAR)
