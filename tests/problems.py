"""Fixed-point problems with known answers, shared by the tests of solvers and gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (batch, ...) with 12 numbers per sample at every rank.
SHAPES = {2: (3, 12), 3: (3, 4, 3), 4: (3, 2, 3, 2)}


@dataclass
class Problem:
    """f maps (B, ...) to itself; ``solution`` is its fixed point in float64 (None: unknown)."""

    f: Callable[[Tensor], Tensor]
    x0: Tensor
    solution: Tensor | None = None
    jacobian: Tensor | None = None  # (B, D, D)


def affine(matrices: Tensor, shape, seed: int = 0) -> Problem:
    """z -> A z + b per sample, with A (B, D, D): solved densely.

    Computed in float64 and rounded to the dtype of z, so that every dtype sees the same map.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, size, _ = matrices.shape
    shift = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrices, shift)

    def f(z: Tensor) -> Tensor:
        n = len(z)  # a smaller batch uses the first matrices
        out = torch.bmm(matrices[:n], z.reshape(n, -1, 1).double())[:, :, 0] + shift[:n]
        return out.to(z.dtype).reshape(z.shape)

    x0 = torch.zeros(shape, dtype=torch.float64)
    return Problem(f, x0, solution.reshape(shape), matrices)


def contraction(shape=SHAPES[2], radius: float = 0.6, seed: int = 0) -> Problem:
    """Linear, spectral norm ``radius``, not symmetric, another matrix for every sample."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch, size = shape[0], math.prod(shape[1:])
    matrices = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    norms = torch.linalg.matrix_norm(matrices, ord=2)
    return affine(radius * matrices / norms[:, None, None], shape, seed)


def rotation(shape=SHAPES[2], radius: float = 1.5, seed: int = 0) -> Problem:
    """Planes turned by an angle of the sample and scaled: eigenvalues radius e^(+-i a).

    Plain iteration diverges for radius above 1; a Krylov method needs two steps.
    """
    batch, size = shape[0], math.prod(shape[1:])
    matrices = torch.zeros(batch, size, size, dtype=torch.float64)
    for sample in range(batch):
        for plane in range(size // 2):
            angle = 1.2 + 0.4 * sample
            c, s = radius * math.cos(angle), radius * math.sin(angle)
            block = slice(2 * plane, 2 * plane + 2)
            matrices[sample, block, block] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return affine(matrices, shape, seed)


def symmetric(shape=(2, 30), radius: float = 0.99, seed: int = 0) -> Problem:
    """Symmetric matrices with eigenvalues spread over [-0.5, radius]: slow for plain iteration."""
    generator = torch.Generator().manual_seed(seed + 2)
    batch, size = shape[0], math.prod(shape[1:])
    noise = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise)
    values = torch.linspace(-0.5, radius, size, dtype=torch.float64)
    return affine(basis @ torch.diag(values) @ basis.transpose(1, 2), shape, seed)


def tanh_layer(shape=SHAPES[2], gain: float = 0.9, seed: int = 0) -> Problem:
    """z -> tanh(A z) + b: a nonlinear contraction; solved by Newton's method."""
    linear = contraction(shape, gain, seed + 3)
    generator = torch.Generator().manual_seed(seed + 4)
    batch, size = shape[0], math.prod(shape[1:])
    shift = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    matrices = linear.jacobian

    def f(z: Tensor) -> Tensor:
        n = len(z)
        out = torch.bmm(matrices[:n], z.reshape(n, -1, 1).double())[:, :, 0].tanh() + shift[:n]
        return out.to(z.dtype).reshape(z.shape)

    z, eye = shift.clone(), torch.eye(size, dtype=torch.float64)
    for _ in range(50):
        slope = 1 - torch.tanh(torch.einsum("bij,bj->bi", matrices, z)).square()
        jacobian = slope[:, :, None] * matrices
        z = z + torch.linalg.solve(eye - jacobian, f(z) - z)
    return Problem(f, torch.zeros(shape, dtype=torch.float64), z.reshape(shape), jacobian)


def cosine() -> Problem:
    """z = cos z, the Dottie number."""
    solution = torch.full((2, 3), 0.7390851332151607, dtype=torch.float64)
    return Problem(torch.cos, torch.zeros(2, 3, dtype=torch.float64), solution)


class Recorder:
    """f that remembers the points it was evaluated at, and its values there."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f
        self.points: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.points.append(z.detach().clone())
        value = self.f(z)
        self.values.append(value.detach().clone())
        return value


def visited(solver: Callable[..., dict], f, x0: Tensor, **options) -> Tensor:
    """The points at which the solver evaluated f, (nfe, B, D)."""
    recorder = Recorder(f)
    solver(recorder, x0, **{"eps": 0.0} | options)
    return torch.stack(recorder.points).flatten(2)


class NanFrom:
    """f that gives NaN for one sample from its call number ``call`` (0 is the first) on."""

    def __init__(self, f: Callable[[Tensor], Tensor], sample: int, call: int):
        self.f, self.sample, self.call, self.calls = f, sample, call, 0

    def __call__(self, z: Tensor) -> Tensor:
        value = self.f(z).clone()
        if self.calls >= self.call:
            value[self.sample] = torch.nan
        self.calls += 1
        return value


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| over everything."""
    return ((found - expected).norm() / expected.norm()).item()


def largest_relative_error(found, expected) -> float:
    """The worst of :func:`relative_error` over pairs of tensors."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def batched_tanh(size=12, gain=2.0, seed=0, batch=3):
    """z -> tanh(A z) + b in batched operations, and (A, b)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    a = gain * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)

    def f(z):
        flat = z.reshape(len(z), -1, 1)
        return (torch.bmm(a.to(z.dtype), flat).tanh()[:, :, 0] + b.to(z.dtype)).view(z.shape)

    return f, a, b


def problem_for(name, **options):
    """A problem that the solver is for."""
    return contraction(**options) if name in ("gmres", "bicgstab") else tanh_layer(**options)


def wall(z):
    """Not finite beyond 1.5; a unit step from 0 goes to 4."""
    return torch.where(z < 1.5, z + 4 * (1 - z), math.nan)
