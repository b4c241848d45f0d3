"""Attach an implicit gradient to a state, and refuse the uses of PyTorch that do not fit it.

The user's state is a copy of f(z*), and the gradient is a hook on the autograd *node* of that copy.
So the state is an ordinary tensor: the user may change it in place, put hooks on it, ask for its
gradient dL/dz, and split a backward pass in two at it. (A hook on a tensor that is a view of f(z*)
would be lost by ``z += x``, and would change the result of ``autograd.grad(L, z)``.)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lib.errors import InputError
from lib.solvers.transforms import differentiating_forward, refuse_batched, tangent_of


def attach(
    fz: Tensor,
    change: Callable[[Tensor], Tensor],
    linear: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """A copy of f(z*) whose incoming gradient g = dL/dz reaches f as ``change(g)``.

    ``change`` may call autograd.grad on ``fz``: this call does not reach the node of the copy. So
    the hook is never removed, and any number of forward passes may wait for their backward.

    Args:
        fz: f(z*), with its graph. The copy has no forward-mode tangent.
        change: maps a tensor of the shape and dtype of ``fz`` to another one.
        linear: replaces ``change`` where second derivatives may follow (create_graph): a linear
            map, which second derivatives treat as constant, and its transpose. Without ``linear``,
            second derivatives are refused.

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
        _refuse_compiled()
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


def _refuse_compiled() -> None:
    """Refuse compiled autograd, which has already freed the tensors that f saved for backward."""
    # Look up instead of import: the module is loaded if compiled autograd is in use.
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
        raise RuntimeError(
            "compiled autograd cannot go through an equilibrium, because its backward pass needs a "
            "solve: leave torch._dynamo.config.compiled_autograd off (torch.compile is fine)"
        )


def refuse_derivative(value: Tensor, *anchors: Tensor) -> Tensor:
    """The result of a solver, such that differentiating it raises an error.

    It depends on the ``anchors``, at least one of which has a graph.
    """
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
    """A linear map whose backward is its transpose.

    The anchor has a graph, so the output has one too, even if ``grad`` has none.
    """

    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor, change: Callable, transposed: Callable):
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
    """The dual tensor of a value and its forward-mode tangent, which cannot be differentiated."""
    if value.requires_grad and torch.is_grad_enabled():
        tangent = refuse_derivative(tangent, value)
    return forward_ad.make_dual(value, tangent)


def own_saved_tensors():
    """A context in which autograd keeps its saved tensors, even inside torch.utils.checkpoint.

    Checkpointing would drop the saved tensors of f, and would repeat the whole forward pass, solver
    included, for each product with the Jacobian. An equilibrium keeps only one evaluation of f.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    module = getattr(hooks[0], "__module__", None) if hooks is not None else None
    checkpointed = module == "torch.utils.checkpoint"
    return saved_tensors_hooks(_same, _same) if checkpointed else nullcontext()


def _same(value: Tensor) -> Tensor:
    return value


@contextmanager
def recording_for(what: str) -> Iterator[None]:
    """A context in which autograd records, even inside no_grad and inference_mode.

    Raises:
        InputError: f saves a tensor made in inference mode for its gradient; the message names
            ``what``, the quantity that needs it.
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
