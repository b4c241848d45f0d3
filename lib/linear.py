"""Matrix products and convolutions on a CPU, by the faster of MKL and oneDNN."""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROWS = 128  # with fewer rows, rearranging the weights for oneDNN costs what its kernels save
_MOST_PIXELS, _LEAST_WEIGHTS = 128, 8_000_000  # limits for a convolution as a product: see conv2d


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
        by_convolution = _convolutions_are_faster() and not torch.is_autocast_enabled("cpu")
    # A bias for every row of x is added to the product; a bias vector goes to the kernel.
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


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolution without bias, groups or dilation, equal to F.conv2d up to rounding.

    oneDNN rearranges the weights at every call. With the few pixels of the lowest resolutions and
    weights larger than the cache, this takes nearly all of its time: 27 ms of 31 ms at 640 x 3200
    channels and 8 pixels on two cores. MKL uses the weights as they are: as a matrix product the
    same convolution takes 8 ms. So such convolutions are computed as products.

    Args:
        x: (B, C, H, W).
        weight: (C', C, k, k).
        stride, padding: in pixels, the same for both directions.

    Returns:
        (B, C', H', W').
    """
    kernel = weight.shape[-1]
    height, width = (1 + (side + 2 * padding - kernel) // stride for side in x.shape[2:])
    few = len(x) * height * width <= _MOST_PIXELS and weight.numel() >= _LEAST_WEIGHTS
    if not few or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.conv2d(x, weight, stride=stride, padding=padding)
    patches = F.unfold(x, kernel, padding=padding, stride=stride)  # (B, C k k, H' W')
    out = F.linear(patches.mT.flatten(0, 1), weight.flatten(1))  # (B H' W', C')
    return out.view(len(x), height * width, -1).mT.reshape(len(x), -1, height, width)


@torch.compiler.assume_constant_result
def _convolutions_are_faster() -> bool:
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
