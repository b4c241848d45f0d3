"""What a map f may offer besides its value f(z), and how f keeps several processes in step.

Solvers and gradients accept any function of the state. A map may offer four more things, which
wrappers of f preserve with :func:`transformed`, but for the last:

- ``f.plain`` is the same map in operations that all have second derivatives. An f of fused kernels
  or compiled code has none itself.
- ``f.select(rows)`` is f restricted to the samples ``rows`` (a LongTensor). With it, a solve that
  stops per sample evaluates f on the unfinished samples only.
- :class:`Affine` states that f(z) = J z + b, and gives products J v without b.
- ``f.source()`` is a method and the tensors that f holds, in lists, tuples or dicts. The method
  makes f from other tensors of the same shapes (:mod:`lib.graphs`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class Affine:
    """The map z -> J z + b, from a function that multiplies with J.

    Args:
        product: v -> J v, both (B, ...), independent for each sample.
        shift: b, (B, ...).
        zero: the tensor of zeros that a solve starts from. Its image is b, which costs no product
            as long as nobody writes to ``zero``.
    """

    def __init__(self, product: Map, shift: Tensor, zero: Tensor | None = None):
        self.product, self.shift, self.zero = product, shift, zero
        self._version = None if zero is None else zero._version

    def __call__(self, z: Tensor) -> Tensor:
        zero = self.zero
        if (
            zero is not None
            and zero._version == self._version
            and z.data_ptr() == zero.data_ptr()
            and z.shape == zero.shape
        ):
            return self.shift.clone()
        return self.product(z) + self.shift


def plain(f: Map) -> Map:
    """``f.plain`` if f offers it, else f."""
    return getattr(f, "plain", f)


def transformed(f: Any, change: Callable[[Map], Map]) -> Map:
    """``change(f)``, offering what f offers. ``change`` must keep the shapes of an affine map."""
    if isinstance(f, Affine):
        out = copy(f)
        out.product = change(f.product)
        return out
    out: Any = change(f)  # a function takes attributes; its type does not say so
    if hasattr(f, "plain"):
        out.plain = change(plain(f))
    if hasattr(f, "product"):  # of lib.graphs
        out.product = lambda *at: f.product(*at, change)
    if hasattr(f, "select"):
        out.select = lambda rows: transformed(f.select(rows), change)
    return out


@contextmanager
def lockstep(f: Map, point: Tensor, group: "dist.ProcessGroup | None") -> Iterator[Map]:
    """A context that gives a form of ``f`` which all processes of ``group`` evaluate equally often.

    With ``torch.distributed.fsdp.fully_shard`` or tensor parallelism, f and its backward gather
    parameters from all processes. Each process solves for its own samples and stops by itself: the
    others would wait for it forever. So a process that leaves the block evaluates f at ``point``,
    for nothing, until all have left. Each evaluation costs one more all-reduce, of a single number.
    Without a group the context gives ``f`` itself.
    """
    if group is None:
        yield f
        return

    def others_go_on(i_do: bool) -> Tensor:
        active = torch.full((), float(i_do), device=point.device)
        dist.all_reduce(active, dist.ReduceOp.MAX, group=group)
        return active

    def change(f: Map) -> Map:
        def evaluated(z: Tensor) -> Tensor:
            others_go_on(True)
            return f(z)

        return evaluated

    yield transformed(f, change)
    while others_go_on(False):
        f(point)


def vjp(fz: Tensor, point: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """J'v for fz = f(point), keeping its graph; zeros if f does not depend on its argument."""
    (found,) = torch.autograd.grad(
        fz, point, v.to(fz.dtype), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(point) if found is None else found
