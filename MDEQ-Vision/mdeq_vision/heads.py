"""The heads: from the branches of the fixed point to class scores per image or per pixel."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.layer_utils import conv3x3

EXPANSION = 4  # output channels / width of a bottleneck


class Bottleneck(nn.Module):
    """conv1x1, conv3x3, conv1x1 to ``EXPANSION * width`` channels, with a residual.

    If the number of channels changes, the residual has a convolution and a batch norm. Only this
    batch norm has affine parameters.
    """

    def __init__(self, channels: int, width: int, momentum: float):
        super().__init__()
        out = EXPANSION * width
        norm = {"momentum": momentum, "affine": False}
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, **norm)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width, **norm)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out, **norm)
        self.downsample = None
        if channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, momentum=momentum)
            )

    def forward(self, y: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, EXPANSION * width, H, W)."""
        t = F.relu(self.bn1(self.conv1(y)))
        t = F.relu(self.bn2(self.conv2(t)))
        residual = y if self.downsample is None else self.downsample(y)
        return F.relu(self.bn3(self.conv3(t)) + residual)


def _conv_bn_relu(conv: nn.Conv2d, momentum: float) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels, momentum=momentum), nn.ReLU(inplace=True)]


def classification_modules(
    channels: list[int], head_channels: list[int], final: int, momentum: float
) -> tuple[nn.ModuleList, nn.ModuleList, nn.Sequential]:
    """Build a bottleneck per branch, the steps from branch to next branch, and the final layer."""
    widths = [EXPANSION * width for width in head_channels]
    bottlenecks = nn.ModuleList(
        nn.Sequential(Bottleneck(c, width, momentum))
        for c, width in zip(channels, head_channels, strict=True)
    )
    steps = nn.ModuleList(
        nn.Sequential(*_conv_bn_relu(conv3x3(a, b, stride=2, bias=True), momentum))
        for a, b in pairwise(widths)
    )
    final_layer = nn.Sequential(*_conv_bn_relu(nn.Conv2d(widths[-1], final, 1), momentum))
    return bottlenecks, steps, final_layer


def segmentation_layer(
    channels: list[int], n_classes: int, kernel: int, momentum: float
) -> nn.Sequential:
    """Build conv1x1 over the concatenated branches, BN, relu, and the convolution to scores."""
    total = sum(channels)
    return nn.Sequential(
        *_conv_bn_relu(nn.Conv2d(total, total, 1), momentum),
        nn.Conv2d(total, n_classes, kernel, padding=kernel // 2),
    )


def to_highest_resolution(branches: list[Tensor]) -> Tensor:
    """Resize all branches bilinearly (align_corners) to the first one's size; concatenate them."""
    size = branches[0].shape[-2:]
    resized = [
        F.interpolate(y, size=size, mode="bilinear", align_corners=True) for y in branches[1:]
    ]
    return torch.cat([branches[0], *resized], dim=1)
