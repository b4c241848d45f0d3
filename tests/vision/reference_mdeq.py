"""The MDEQ models written out from their equations, for comparison with the package.

The state is a plain list of (B, C_i, H_i, W_i). Norms, resizing and weight normalisation are
spelled out; of PyTorch's functions only the convolution is used. Nothing of the package is used,
and nothing is fast.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of both kinds of norm


def resize_nearest(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Pixel (i, j) of the result is (i // factor, j // factor) of x."""
    rows = torch.tensor([i // factor for i in range(size[0])])
    columns = torch.tensor([j // factor for j in range(size[1])])
    return x[:, :, rows][:, :, :, columns]


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Corner pixels stay in the corners."""

    def weights(n_in: int, n_out: int) -> Tensor:
        matrix = torch.zeros(n_out, n_in, dtype=x.dtype)
        for i in range(n_out):
            at = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
            low = min(int(at), n_in - 1)
            matrix[i, low] += 1 - (at - low)
            if low + 1 < n_in:
                matrix[i, low + 1] += at - low
        return matrix

    rows, columns = weights(x.shape[2], size[0]), weights(x.shape[3], size[1])
    return torch.einsum("ih,bchw,jw->bcij", rows, x, columns)


@dataclass
class Reference:
    """A model's numbers by their state-dict names, and its settings.

    Attributes:
        state: parameters and buffers.
        cfg: the configuration, read as plain data.
        batch_statistics: batch norm as in training.
        masks: of the dropouts, by (branch, block); none in evaluation.
        momentum: of batch norm.
        used: the names that were read.
        running: running statistics after the forward, by name.
    """

    state: dict[str, Tensor]
    cfg: dict
    batch_statistics: bool = False
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    momentum: float = 0.1
    used: set[str] = field(default_factory=set)
    running: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.model = self.cfg["MODEL"]
        self.stage = self.model["EXTRA"]["FULL_STAGE"]
        self.n, self.widths = self.stage["NUM_BRANCHES"], self.stage["NUM_CHANNELS"]
        self.groups = self.model["NUM_GROUPS"]

    # --- Pieces ---------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        self.used.add(name)
        return self.state[name]

    def conv(self, x, name, out, kernel, stride=1, bias=False, wnorm=False) -> Tensor:
        if wnorm:
            v, g = self.get(f"{name}.weight_v"), self.get(f"{name}.weight_g")
            w = torch.stack([g[i] * v[i] / v[i].square().sum().sqrt() for i in range(len(v))])
        else:
            w = self.get(f"{name}.weight")
        assert w.shape == (out, x.shape[1], kernel, kernel), name
        y = F.conv2d(x, w, stride=stride, padding=(kernel - 1) // 2)
        return y + self.get(f"{name}.bias")[:, None, None] if bias else y

    def group_norm(self, x, name, groups, affine) -> Tensor:
        pieces = x.reshape(len(x), groups, -1)
        mean = pieces.mean(2, keepdim=True)
        variance = (pieces - mean).square().mean(2, keepdim=True)
        y = ((pieces - mean) / (variance + EPS).sqrt()).reshape(x.shape)
        if affine:
            weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
            y = y * weight[:, None, None] + bias[:, None, None]
        return y

    def batch_norm(self, x, name, affine=True) -> Tensor:
        mean, variance = self.get(f"{name}.running_mean"), self.get(f"{name}.running_var")
        if self.batch_statistics:
            old, count = (mean, variance), x.numel() / x.shape[1]
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            new = (mean.detach(), variance.detach() * count / (count - 1))
            for part, a, b in zip(("mean", "var"), old, new, strict=True):
                self.running[f"{name}.running_{part}"] = (1 - self.momentum) * a + self.momentum * b
        y = (x - mean[:, None, None]) / (variance[:, None, None] + EPS).sqrt()
        if affine:
            weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
            y = y * weight[:, None, None] + bias[:, None, None]
        return y

    # --- Stem -----------------------------------------------------------------------------

    def stem(self, image: Tensor) -> Tensor:
        times, width, x = self.model["DOWNSAMPLE_TIMES"], self.widths[0], image
        names = [("0", "1"), ("3", "4"), *[(f"DS{k}", f"DS{k}-BN") for k in range(3, times + 1)]]
        for k, (conv, norm) in enumerate(names, start=1):
            x = self.conv(x, f"downsample.{conv}", width, 3, stride=2 if times >= k else 1)
            x = self.batch_norm(x, f"downsample.{norm}").relu()
        if times == 0 and self.n <= 2:
            return x
        x = self.conv(x, "stage0.0", width, 1)
        return self.batch_norm(x, "stage0.1").relu()

    def zeros(self, injection: Tensor) -> list[Tensor]:
        sizes = [injection.shape[2:]]
        for _ in range(self.n - 1):
            sizes.append([(side + 1) // 2 for side in sizes[-1]])
        return [
            torch.zeros(len(injection), c, *size, dtype=injection.dtype)
            for c, size in zip(self.widths, sizes, strict=True)
        ]

    # --- f --------------------------------------------------------------------------------

    def block(self, z: Tensor, x: Tensor | float, i: int, k: int) -> Tensor:
        name, width = f"fullstage.branches.{i}.blocks.{k}", self.widths[i]
        inner = int(self.model["EXPANSION_FACTOR"] * width)
        kernels = [5 if self.stage["BIG_KERNELS"][i] >= m else 3 for m in (1, 2)]
        wnorm, affine = self.model["WNORM"], self.model["BLOCK_GN_AFFINE"]
        t = self.conv(z, f"{name}.conv1", inner, kernels[0], wnorm=wnorm)
        t = self.group_norm(t, f"{name}.gn1", self.groups, affine).relu()
        t = self.conv(t, f"{name}.conv2", width, kernels[1], wnorm=wnorm)
        if (i, k) in self.masks:
            t = t * self.masks[i, k]
        t = self.group_norm(t + x, f"{name}.gn2", self.groups, affine)
        return self.group_norm((t + z).relu(), f"{name}.gn3", self.groups, affine)

    def transform(self, out: Tensor, i: int, j: int, size) -> Tensor:
        """T_ij(out_j)."""
        name, affine = f"fullstage.fuse_layers.{i}.{j}.net", self.model["FUSE_GN_AFFINE"]
        if j > i:
            y = self.conv(out, f"{name}.conv", self.widths[i], 1)
            y = self.group_norm(y, f"{name}.gnorm", self.groups, affine)
            return resize_nearest(y, 2 ** (j - i), size)
        y = out
        for k in range(i - j):
            last = k == i - j - 1
            y = self.conv(y, f"{name}.{k}.conv", self.widths[i if last else j], 3, stride=2)
            y = self.group_norm(y, f"{name}.{k}.gnorm", self.groups, affine)
            y = y if last else y.relu()
        return y

    def f(self, z: list[Tensor], injection: Tensor) -> list[Tensor]:
        outs = []
        for i, out in enumerate(z):
            for k in range(self.stage["NUM_BLOCKS"][i]):
                out = self.block(out, injection if i == k == 0 else 0.0, i, k)
            outs.append(out)
        if self.n == 1:
            return outs
        new = []
        for i, own in enumerate(outs):
            y = own
            for j in range(self.n):
                if j != i:
                    y = y + self.transform(outs[j], i, j, own.shape[2:])
            name = f"fullstage.post_fuse_layers.{i}"
            y = self.conv(y.relu(), f"{name}.conv", self.widths[i], 1, wnorm=self.model["WNORM"])
            affine = self.model["POST_GN_AFFINE"]
            new.append(self.group_norm(y, f"{name}.gnorm", self.groups // 2, affine))
        return new

    def iterate(self, image: Tensor, times: int) -> tuple[list[Tensor], float]:
        """f applied ``times`` times from zero, and the last relative change."""
        injection = self.stem(image)
        z, change = self.zeros(injection), float("nan")
        for _ in range(times):
            old, z = z, self.f(z, injection)
            difference = sum((a - b).square().sum() for a, b in zip(z, old, strict=True))
            change = (difference / sum(a.square().sum() for a in z)).sqrt().item()
        return z, change

    # --- Heads ----------------------------------------------------------------------------

    def cls_head(self, z: list[Tensor]) -> Tensor:
        y = None
        heads, final = self.stage["HEAD_CHANNELS"], self.stage["FINAL_CHANSIZE"]
        for i, (z_i, width) in enumerate(zip(z, heads, strict=True)):
            name = f"incre_modules.{i}.0"
            t = self.batch_norm(self.conv(z_i, f"{name}.conv1", width, 1), f"{name}.bn1", False)
            t = self.conv(t.relu(), f"{name}.conv2", width, 3)
            t = self.batch_norm(t, f"{name}.bn2", False).relu()
            t = self.batch_norm(self.conv(t, f"{name}.conv3", 4 * width, 1), f"{name}.bn3", False)
            residual = z_i
            if self.widths[i] != 4 * width:
                residual = self.conv(z_i, f"{name}.downsample.0", 4 * width, 1)
                residual = self.batch_norm(residual, f"{name}.downsample.1")
            bottleneck = (t + residual).relu()
            if y is None:
                y = bottleneck
            else:
                name = f"downsamp_modules.{i - 1}"
                y = self.conv(y, f"{name}.0", 4 * width, 3, stride=2, bias=True)
                y = bottleneck + self.batch_norm(y, f"{name}.1").relu()
        y = self.conv(y, "final_layer.0", final, 1, bias=True)
        y = self.batch_norm(y, "final_layer.1").relu().mean((2, 3))
        weight, bias = self.get("classifier.weight"), self.get("classifier.bias")
        assert weight.shape == (self.model["NUM_CLASSES"], final)
        return torch.einsum("of,bf->bo", weight, y) + bias

    def seg_head(self, z: list[Tensor]) -> Tensor:
        size = tuple(z[0].shape[2:])
        y = torch.cat([resize_bilinear(z_i, size) for z_i in z], 1)
        y = self.conv(y, "last_layer.0", sum(self.widths), 1, bias=True)
        y = self.batch_norm(y, "last_layer.1").relu()
        kernel = self.model["EXTRA"].get("FINAL_CONV_KERNEL", 1)
        classes = self.cfg["DATASET"]["NUM_CLASSES"]
        return self.conv(y, "last_layer.3", classes, kernel, bias=True)
