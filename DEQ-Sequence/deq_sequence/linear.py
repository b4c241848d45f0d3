"""Matrix products on a CPU, by the faster of MKL and oneDNN."""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROWS = 128  # with fewer rows, rearranging the weights for oneDNN costs what its kernels save


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, equal to F.linear up to rounding.

    In float32 F.linear calls MKL. On processors that Intel did not make, MKL uses only its AVX2
    kernels: 108 GFLOP/s per core on an AMD EPYC 9005 (Zen 5), where the AVX-512 kernels of oneDNN
    reach 230. PyTorch calls these kernels for convolutions, with more than one thread. On such
    processors, and with more than one thread, this function is therefore a convolution of kernel
    size 1, with all its derivatives.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or the shape of the result.

    Returns:
        (..., N).
    """
    k, rows = x.shape[-1], x.shape[:-1].numel()
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows < _LEAST_ROWS or rows % 2:
        by_convolution = False
    else:
        by_convolution = _by_convolution() and not torch.is_autocast_enabled("cpu")
    # A bias for every row of x is added to the product; a bias vector goes to the kernel.
    half = autocast_dtype(x) if weight.dtype == torch.float32 else None
    recorded = torch.is_grad_enabled() and (bias is None or bias.dim() == 1)
    if half and recorded and (weight.is_leaf or weight._is_view()):  # W is kept anyway
        return _Half.apply(x.to(half), weight, bias)
    rowwise, vector = (bias, None) if bias is not None and bias.dim() > 1 else (None, bias)
    if by_convolution:
        # The rows of x become the pixels of an image of height 2. With height 1, or with rows as
        # samples, PyTorch does not recognise the channels-last layout, which needs no copies.
        image = x.reshape(1, 2, rows // 2, k).permute(0, 3, 1, 2)
        out = F.conv2d(image, weight[:, :, None, None], vector)
        out = out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
        return out if rowwise is None else out + rowwise
    if rowwise is not None:
        product = torch.addmm(rowwise.reshape(rows, -1), x.reshape(rows, k), weight.t())
        return product.view(rowwise.shape)
    return F.linear(x, weight, vector)


class _Half(torch.autograd.Function):
    """x W' + b in the dtype of x, from a W that is kept anyway, in float32.

    Autocast would keep W in half precision too, from forward to backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        back = grad @ weight.to(grad.dtype) if wanted[0] else None
        own = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if wanted[1] else None
        return back, own, rows.sum(0).to(weight.dtype) if wanted[2] else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype for products with x; None where autocast is off or changes nothing."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)  # not on the meta device
    if x.dtype == torch.float64 or not available or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _by_convolution() -> bool:
    if torch.compiler.is_compiling():  # True only while the compiler traces
        # It loads the compiler (2 seconds of imports), which is loaded already while it traces.
        from deq_sequence.compiled_linear import convolutions_are_faster as chosen

        return chosen()
    return convolutions_are_faster()


def convolutions_are_faster() -> bool:
    """Whether :func:`linear` uses convolutions for float32 on this processor."""
    return torch.get_num_threads() > 1 and _mkl_holds_back()


@cache
def _mkl_holds_back() -> bool:
    """Whether MKL does not use AVX-512 on this processor, but oneDNN does."""
    backends = torch.backends
    return (
        backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and backends.cpu.get_cpu_capability() == "AVX512"
        and not _made_by_intel()
    )


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())
