"""Small equilibrium layers, and their gradients through the unrolled iteration (float64)."""

from functools import partial

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """tanh(W z + U x + b), a contraction: ||W|| = 0.7."""

    def __init__(self, size: int = 6, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        w = draw(size, size)
        self.w = nn.Parameter(0.7 * w / torch.linalg.matrix_norm(w, ord=2))
        self.u, self.b = nn.Parameter(draw(size, size)), nn.Parameter(draw(size))
        self.x = nn.Parameter(draw(3, size))
        self.z0 = torch.zeros(3, size, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x @ self.u.T + self.b)


class ConvTanh(nn.Module):
    """tanh(conv(z) + x) on a state (B, C, H, W)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.kernel = nn.Parameter(0.11 * draw(2, 2, 3, 3))
        self.x = nn.Parameter(draw(2, 2, 4, 5))
        self.z0 = torch.zeros(2, 2, 4, 5, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(z, self.kernel, padding=1) + self.x)


class TwoScales(nn.Module):
    """A state of two tensors, (B, 2, 4, 4) and (B, 3, 2, 2), each in the other's equation."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.down, self.up = nn.Parameter(0.2 * draw(3, 2)), nn.Parameter(0.2 * draw(2, 3))
        self.high, self.low = nn.Parameter(draw(2, 2, 4, 4)), nn.Parameter(draw(2, 3, 2, 2))
        self.z0 = [torch.zeros_like(self.high), torch.zeros_like(self.low)]

    def forward(self, z: list[Tensor]) -> list[Tensor]:
        high, low = z
        pooled = nn.functional.avg_pool2d(high, 2)
        raised = nn.functional.interpolate(low, scale_factor=2)
        return [
            torch.tanh(0.4 * high + torch.einsum("oi,bihw->bohw", self.up, raised) + self.high),
            torch.tanh(0.4 * low + torch.einsum("oi,bihw->bohw", self.down, pooled) + self.low),
        ]


def loss_of(z: Tensor | list[Tensor], power: int = 2) -> Tensor:
    """A loss whose gradient differs from element to element."""
    flat = torch.cat([t.flatten() for t in z]) if isinstance(z, list) else z.flatten()
    ramp = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)
    return (ramp * flat**power).sum()


def gradients(loss: Tensor, layer: nn.Module, **options) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters()), **options))


def unrolled_gradients(layer: nn.Module, power: int = 2) -> list[Tensor]:
    """Autograd through 200 applications: 0.85^200 is far below rounding of the figures here."""
    z = layer.z0
    for _ in range(200):
        z = layer(z)
    return gradients(loss_of(z, power), layer)


class Fragile(torch.autograd.Function):
    """Identity whose backward raises, or gives NaN for sample 0, while ``mode`` says so."""

    mode = "fine"

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Fragile.mode == "raise":
            raise ZeroDivisionError("inside the adjoint")
        grad = grad.clone()
        if Fragile.mode == "nan":
            grad[0] = torch.nan
        return grad
