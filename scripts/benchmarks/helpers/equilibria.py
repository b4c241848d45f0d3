"""Layers in float64 whose Jacobian has a given spectral radius, and their exact gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from deq_sequence.layer import TransformerLayer
from lib.layer_utils import list2vec, vec2list
from mdeq_vision.config import config
from mdeq_vision.layer import MultiscaleLayer, branch_sizes

LAYERS = ("toy", "transformer", "images")
_STAGE = {"NUM_BRANCHES": 2, "NUM_CHANNELS": [4, 4], "NUM_BLOCKS": [1, 1], "BIG_KERNELS": [0, 0]}


@dataclass
class Equilibrium:
    """z -> c + s (f(z) - f(c)) for a layer f and a point c of its range.

    c is its fixed point, and the Jacobian there is s times that of f: any spectral radius.
    """

    f: Callable[[Tensor], Tensor]
    z_star: Tensor  # (B, ...)
    start: Tensor  # so near it that solvers find it: at a radius near 1 there are others
    weights: list[Tensor]  # what is trained

    def gradient(self, z: Tensor) -> Tensor:
        """Of :func:`loss` at z, which has a graph, with respect to all weights: one vector."""
        grads = torch.autograd.grad(
            loss(z), self.weights, materialize_grads=True, retain_graph=True
        )
        return torch.cat([g.flatten() for g in grads])

    def exact(self) -> Tensor:
        """The gradient by a dense solve with I - J at the fixed point."""
        jacobian = dense_jacobian(self.f, self.z_star)
        z = self.z_star.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(z), z)
        eye = torch.eye(len(jacobian), dtype=jacobian.dtype)
        adjoint = torch.linalg.solve((eye - jacobian).T, grad.flatten()).view(z.shape)
        grads = torch.autograd.grad(
            self.f(self.z_star), self.weights, adjoint, materialize_grads=True, retain_graph=True
        )
        return torch.cat([g.flatten() for g in grads])


def loss(z: Tensor) -> Tensor:
    """A loss whose gradient differs from element to element."""
    ramp = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype, device=z.device)
    return (ramp * z.flatten().square()).sum()


def dense_jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """df/dz of all samples together, (B D, B D)."""
    jacobian = torch.autograd.functional.jacobian(f, z, vectorize=True)
    return jacobian.reshape(z.numel(), z.numel())


def equilibrium(name: str, radius: float, seed: int = 0) -> Equilibrium:
    """A layer of :data:`LAYERS` whose Jacobian at its fixed point has that spectral radius."""
    torch.manual_seed(seed)
    f, z0, weights = _MAKERS[name]()
    with torch.no_grad():
        center = f(f(f(z0)))
        value = f(center)
    own = torch.linalg.eigvals(dense_jacobian(f, center)).abs().max().item()
    scale = radius / own

    def scaled(z: Tensor) -> Tensor:
        return center + scale * (f(z) - value)

    start = center + 1e-3 * center.square().mean().sqrt() * torch.randn_like(center)
    return Equilibrium(scaled, center, start, weights)


def _toy() -> tuple[Callable, Tensor, list[Tensor]]:
    """tanh(W z + U x + b), 3 samples of 12."""
    batch, size = 3, 12
    w = torch.randn(size, size, dtype=torch.float64)
    w = nn.Parameter(1.2 * w / math.sqrt(size))
    u, b = (nn.Parameter(torch.randn(*s, dtype=torch.float64)) for s in ((size, size), (size,)))
    x = torch.randn(batch, size, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w.T + x @ u.T + b)

    return f, torch.zeros(batch, size, dtype=torch.float64), [w, u, b]


def _transformer() -> tuple[Callable, Tensor, list[Tensor]]:
    """The language model's layer: 2 segments of 8 words after 4, 2 heads of 8 channels."""
    batch, words, memory, d = 2, 8, 4, 16
    layer = TransformerLayer(2, d, d // 2, 32, 0.0, 0.0).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.25)
    draw = [torch.randn(*s, dtype=torch.float64) for s in ((batch, memory + words, 3 * d),
            (batch, memory, d), (1, memory + words, d))]  # fmt: skip
    z0 = torch.zeros(batch, words, d, dtype=torch.float64)
    return layer.prepare(*draw), z0, list(layer.parameters())


def _images() -> tuple[Callable, Tensor, list[Tensor]]:
    """The image model's layer: 2 images of 8 x 8, two branches of 4 channels, as one state."""
    cfg = config.clone()
    cfg.defrost()
    cfg.MODEL.EXTRA.FULL_STAGE = CfgNode(_STAGE)
    cfg.MODEL.NUM_GROUPS, cfg.MODEL.EXPANSION_FACTOR = 2, 2
    layer = MultiscaleLayer(cfg).double()
    injection = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    z0 = [injection.new_zeros(2, 4, *size) for size in branch_sizes(8, 8, 2)]
    inner, shapes = layer.prepare(injection, z0), [tuple(t.shape[1:]) for t in z0]
    flat = list2vec(z0)
    return lambda z: list2vec(inner(vec2list(z, shapes))), flat, list(layer.parameters())


_MAKERS = {"toy": _toy, "transformer": _transformer, "images": _images}
