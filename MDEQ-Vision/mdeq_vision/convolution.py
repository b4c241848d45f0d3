"""Convolutions on a CPU, by the faster of oneDNN and MKL."""

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_PIXELS, _LEAST_WEIGHTS = 128, 8_000_000  # limits for a convolution as a product: see conv2d


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
