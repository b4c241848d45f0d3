"""Matrix products by the faster of the two libraries that PyTorch has on a CPU."""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROWS = 128  # with fewer, preparing the weights for oneDNN costs what its kernels save


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, as F.linear computes it, to rounding.

    In float32 F.linear calls MKL, which on processors of other makers than Intel keeps to its AVX2
    kernels: 108 GFLOP/s a core on an AMD EPYC 9005 (Zen 5) that does 230 with the AVX-512 kernels
    of oneDNN. PyTorch reaches those through convolutions. So there, and with more than one thread
    (as PyTorch demands for it), this is a convolution of kernel size 1, with all its derivatives.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or of the shape of the result.

    Returns:
        (..., N).
    """
    k, rows = x.shape[-1], x.shape[:-1].numel()
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows < _LEAST_ROWS or rows % 2:
        by_convolution = False
    else:
        by_convolution = _convolutions_are_faster() and not torch.is_autocast_enabled("cpu")
    whole = bias is not None and bias.dim() > 1
    if by_convolution:
        # Rows as pixels, in two lines of them: a single line, or pixels as samples, would not be
        # seen as the layout with channels last that needs no copies.
        image = x.reshape(1, 2, rows // 2, k).permute(0, 3, 1, 2)
        out = F.conv2d(image, weight[:, :, None, None], None if whole else bias)
        out = out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
        return out + bias if whole else out
    if whole:
        product = torch.addmm(bias.reshape(rows, -1), x.reshape(rows, k), weight.t())
        return product.view(bias.shape)
    return F.linear(x, weight, bias)


@torch.compiler.assume_constant_result
def _convolutions_are_faster() -> bool:
    return torch.get_num_threads() > 1 and _mkl_holds_back()


@cache
def _mkl_holds_back() -> bool:
    """Whether MKL leaves AVX-512 unused, and oneDNN does not."""
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
