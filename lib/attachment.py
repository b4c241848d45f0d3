"""How a state gets a gradient of its own, and what else PyTorch does that does not fit it.

The state that a user gets is a copy of f(z*), and the gradient hangs on the *node* of that copy.
So the state is an ordinary tensor of the user's: it may be changed in place, hooked, asked for its
own gradient dL/dz, and be the place where a backward pass is split in two. (A hook on a tensor
that is a view of f(z*) is lost by ``z += x``, and ``autograd.grad(L, z)`` would see its work.)
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lib.errors import InputError

INSTEAD = "use torch.autograd instead (grad, backward, functional.jacobian, one by one)"


def attach(
    fz: Tensor,
    change: Callable[[Tensor], Tensor],
    linear: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """A copy of f(z*) whose incoming gradient g = dL/dz reaches f as ``change(g)``.

    ``change`` may differentiate ``fz`` itself: its own autograd.grad cannot meet the node of the
    copy, so nothing is ever removed, and any number of forwards may be pending.

    Args:
        fz: f(z*), with its graph. The copy has no forward-mode tangent.
        change: takes and gives a tensor of the shape and dtype of ``fz``.
        linear: what takes the place of ``change`` where second derivatives may follow
            (create_graph): a linear map that is itself a constant to them, and its transpose.
            Without it they are refused.

    Raises (in backward):
        RuntimeError: a gradient of many at once (is_grads_batched), or a second derivative.
    """
    dual = tangent_of(fz) is not None
    out = (forward_ad.unpack_dual(fz).primal if dual else fz).clone()
    if not out.requires_grad:
        return out  # f depends on nothing that is trained

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
        # With create_graph the adjoint would look like a constant to a second derivative.
        return (refuse_derivative(adjoint, fz, grad) if torch.is_grad_enabled() else adjoint,)

    out.grad_fn.register_prehook(replaced)
    return out


def refuse_batched(value: Tensor | None) -> None:
    """Refuse a gradient, or a tangent, of many directions at once.

    Raises:
        RuntimeError: it is one.
    """
    functorch = torch._C._functorch
    if value is None:
        return
    if functorch.is_batchedtensor(value) or functorch.is_legacy_batchedtensor(value):
        raise RuntimeError(
            "a batch of gradients or tangents (is_grads_batched, vectorize=True) cannot go through "
            "an equilibrium at once, because each needs a solve: take them one after the other"
        )


def _refuse_compiled() -> None:
    """Refuse a backward pass by compiled autograd, which has freed what f kept by then."""
    at_work = sys.modules.get("torch._dynamo.compiled_autograd")  # where it is, it was imported
    if at_work is not None and at_work.in_compiled_autograd_region:
        raise RuntimeError(
            "compiled autograd cannot go through an equilibrium, because its backward pass needs a "
            "solve: leave torch._dynamo.config.compiled_autograd off (torch.compile is fine)"
        )


def refuse_derivative(value: Tensor, *anchors: Tensor) -> Tensor:
    """``value``, which fails in words where it is differentiated, instead of being a constant.

    Args:
        anchors: what the value depends on: at least one tensor with a graph.
    """
    return _Refuse.apply(value, *anchors)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "second derivatives through an equilibrium are not available by this gradient, because "
            "its adjoint is the result of a solver: take grad='ift:order=2' for them, or the "
            "Jacobian loss for regularisation"
        )


class _Linear(torch.autograd.Function):
    """A linear map and its transpose. The anchor makes sure that the node is met."""

    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor, change: Callable, transposed: Callable):
        ctx.transposed = transposed
        return change(grad)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_batched(grad)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "third derivatives through an equilibrium are not available: in the second "
                "backward pass leave create_graph out (retain_graph=True keeps the graph), and in "
                "place of functional.hvp take vhp"
            )
        return ctx.transposed(grad), None, None, None


def differentiating_forward() -> bool:
    """Whether forward-mode differentiation is going on (a dual level is open)."""
    return forward_ad._current_level >= 0


def tangent_of(value: Tensor) -> Tensor | None:
    """The forward-mode tangent of a tensor; None where it has none."""
    if not differentiating_forward():
        return None
    return forward_ad.unpack_dual(value).tangent


def with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor of a value and its forward-mode tangent, which has no derivative itself."""
    if value.requires_grad and torch.is_grad_enabled():
        tangent = refuse_derivative(tangent, value)
    return forward_ad.make_dual(value, tangent)


def refuse_transforms() -> None:
    """Refuse torch.func and torch.export, which solvers cannot be traced by.

    Raises:
        InputError: inside of one of them.
    """
    if torch.compiler.is_exporting():
        raise InputError(
            "a solve cannot be exported, because its number of steps depends on values: export f "
            "alone (one evaluation) and solve around it"
        )
    # torch.func.linearize and make_fx trace without an interpreter; fake tensors have no values.
    modes = torch._C._TorchDispatchModeKey
    traced = any(torch._C._get_dispatch_mode(mode) for mode in (modes.PROXY, modes.FAKE))
    if traced or torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "a solve inside a transform of torch.func (grad, vmap, jvp, ...), or traced, is not "
            "possible, "
            f"because its number of steps depends on values: {INSTEAD}"
        )


def outside_of_compiler(function: Callable) -> Callable:
    """Decorator: torch.compile calls this function and does not look inside.

    A solve has an unknown number of steps and reads residuals, so that a compiled model would
    fall into dozens of graphs, made anew for each shape of history. An f that is itself compiled
    stays so.
    """

    @functools.wraps(function)
    def called(*args, **kwargs):
        if torch.compiler.is_compiling():  # a constant for the compiler; else False
            from lib.eager import call  # loads the compiler, so only where it is at work already

            return call(function, *args, **kwargs)
        return function(*args, **kwargs)

    return called


def own_saved_tensors():
    """A context in which autograd keeps what it saves, even inside torch.utils.checkpoint.

    Checkpointing drops what f saved and repeats the whole forward pass, solver included, at each
    product with its Jacobian. An equilibrium keeps one evaluation of f anyway.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    module = getattr(hooks[0], "__module__", None) if hooks is not None else None
    checkpointed = module == "torch.utils.checkpoint"
    return saved_tensors_hooks(_same, _same) if checkpointed else nullcontext()


def _same(value: Tensor) -> Tensor:
    return value


@contextmanager
def recording_for(what: str) -> Iterator[None]:
    """Let autograd record in here, even inside no_grad and inference_mode.

    Raises:
        InputError: f keeps, for its gradient, a tensor made in inference mode, which autograd
            refuses.
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
