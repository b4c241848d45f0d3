"""Attach an implicit gradient to a state, and refuse the uses of PyTorch that do not fit.

The user's state is a copy of f(z*), and the gradient is a hook on the autograd *node* of that copy.
So the state is an ordinary tensor: the user may change it in place, put hooks on it, ask for its
gradient dL/dz, and split a backward pass at it. (A hook on a tensor, a view of f(z*), would be lost
by ``z += x``, and would change the result of ``autograd.grad(L, z)``.)
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lib.errors import InputError
from lib.solvers.maps import Map
from lib.solvers.transforms import differentiating_forward, refuse_batched, tangent_of


def attach(
    fz: Tensor,
    change: Map,
    linear: tuple[Map, Map] | None = None,
) -> Tensor:
    """A copy of f(z*) whose incoming gradient g = dL/dz reaches f as ``change(g)``.

    ``change`` may call autograd.grad on ``fz``, which does not reach the node of the copy. So the
    hook is never removed, and any number of forward passes may wait for their backward.

    Args:
        fz: f(z*), with its graph. The copy has no forward-mode tangent.
        change: maps a tensor of the shape and dtype of ``fz`` to another one.
        linear: replaces ``change`` where second derivatives may follow (create_graph): a linear
            map, constant to second derivatives, and its transpose. None refuses them.

    Raises (in backward):
        RuntimeError: a batch of gradients (is_grads_batched); forward mode over reverse mode; a
            backward pass by compiled autograd; a second derivative without ``linear``, or a third.
    """
    dual = tangent_of(fz) is not None
    out = (forward_ad.unpack_dual(fz).primal if dual else fz).clone()
    if not out.requires_grad:
        return out  # f depends on no tensor that requires grad

    def replaced(grads: tuple[Tensor | None]) -> tuple[Tensor | None]:
        (grad,) = grads
        if grad is None:
            return grads  # an operation behind z has no gradient
        # Compiled autograd has already freed the tensors that f saved for backward. Look up instead
        # of import: the module is loaded if it is in use.
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled is not None and compiled.in_compiled_autograd_region:
            raise RuntimeError(
                "compiled autograd cannot go through an equilibrium, because its backward pass "
                "needs a solve: leave torch._dynamo.config.compiled_autograd off (torch.compile is "
                "fine)"
            )
        refuse_batched(grad)
        if differentiating_forward() and (dual or tangent_of(grad) is not None):
            raise RuntimeError(
                "forward mode over reverse mode is a second derivative, which is not available "
                "through an equilibrium: take reverse mode twice, with grad='ift:order=2'"
            )
        if torch.is_grad_enabled() and linear is not None:
            return (_Linear.apply(grad, fz, *linear),)
        adjoint = change(grad)
        # With create_graph, a second derivative would silently treat the adjoint as a constant.
        return (refuse_derivative(adjoint, fz, grad) if torch.is_grad_enabled() else adjoint,)

    assert out.grad_fn is not None  # clone() of a tensor that requires grad
    out.grad_fn.register_prehook(replaced)
    return out


def refuse_derivative(value: Tensor, *anchors: Tensor) -> Tensor:
    """The value, such that differentiating it raises. The anchors give it a graph."""
    return _Refuse.apply(value, *anchors)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "second derivatives through an equilibrium are not available by this gradient, because "
            "its adjoint is the result of a solver: take grad='ift:order=2' for them, or the "
            "Jacobian loss for regularisation"
        )


class _Linear(torch.autograd.Function):
    """A linear map whose backward is its transpose. The anchor gives its output a graph."""

    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor, change: Map, transposed: Map):
        ctx.transposed = transposed
        return change(grad)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_batched(grad)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "third derivatives through an equilibrium are not available: in the second "
                "backward pass leave create_graph out (retain_graph=True keeps the graph), and in "
                "place of functional.hvp take vhp"
            )
        return ctx.transposed(grad), None, None, None


def with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor of a value and a tangent, which cannot be differentiated."""
    if value.requires_grad and torch.is_grad_enabled():
        tangent = refuse_derivative(tangent, value)
    return forward_ad.make_dual(value, tangent)


def own_saved_tensors():
    """A context in which autograd keeps its saved tensors, even inside torch.utils.checkpoint.

    That would repeat the whole forward pass, solver included, for each product with the Jacobian.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is None or getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        return nullcontext()
    return saved_tensors_hooks(lambda t: t, lambda t: t)


@contextmanager
def recording_for(what: str) -> Iterator[None]:
    """A context in which autograd records, even inside no_grad and inference_mode.

    Raises:
        InputError: f saves a tensor made in inference mode for its gradient, which ``what`` needs.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise InputError(
            f"{what} differentiates f, which cannot be done with tensors made in inference mode: "
            "use torch.no_grad() in place of torch.inference_mode()"
        ) from error
