"""Small image models whose every number is set, and images for them."""

from functools import partial

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from lib.solvers import broyden
from mdeq_vision import MDEQClsNet, MDEQSegNet
from mdeq_vision.config import config
from mdeq_vision.model import MDEQNet

NETS = {"cls": MDEQClsNet, "seg": MDEQSegNet}
STACKED, EQUILIBRIUM = 0, -1  # values of train_step
# Both solves end at 1e-12, well below what is asserted of anything that follows from them.
TIGHT = partial(broyden, eps=1e-12)
THRESHOLD = 400


def tiny_config(branches: int = 2, **changes) -> CfgNode:
    """The settings of a model with four channels or so per branch.

    Args:
        branches: how many.
        changes: MODEL and FULL_STAGE keys by their own names (NUM_GROUPS=4, NUM_BLOCKS=[2, 1]),
            COMPILE too, others with their section (DEQ__F_THRES=3).
    """
    cfg = config.clone()
    cfg.defrost()
    cfg.MODEL.update(
        NUM_LAYERS=3, NUM_GROUPS=2, NUM_CLASSES=5, DOWNSAMPLE_TIMES=0, EXPANSION_FACTOR=2
    )
    cfg.DATASET.NUM_CLASSES = 4
    cfg.DEQ.STOP_MODE = "rel"
    cfg.TRAIN.PRETRAIN_STEPS = 10
    stage = CfgNode(
        {
            "NUM_BRANCHES": branches,
            "NUM_CHANNELS": [4, 6, 4, 8][:branches],
            "NUM_BLOCKS": [1] * branches,
            "BIG_KERNELS": [0] * branches,
            "HEAD_CHANNELS": [3, 3, 5, 4][:branches],  # no residual is the identity
            "FINAL_CHANSIZE": 7,
        }
    )
    cfg.MODEL.EXTRA.FULL_STAGE = stage
    for name, value in changes.items():
        if name == "FINAL_CONV_KERNEL":
            cfg.MODEL.EXTRA[name] = value
        elif name in ("COMPILE", "GRAPH"):
            cfg[name] = value
        elif name in stage:
            stage[name] = value
        else:
            section, _, key = name.rpartition("__")
            node = cfg[section or "MODEL"]
            assert key in node, name
            node[key] = value
    return cfg


def fill(model: nn.Module, seed: int = 1) -> None:
    """Set every parameter and running statistic to something that is not its initial value.

    Weights are large enough to matter. Affine GroupNorms weigh less than their biases, which
    damps f: it becomes a contraction, or nearly so. What batch norm gives is mostly positive, so
    that the few channels survive their relus.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict(keep_vars=True).items():
        if not t.is_floating_point():
            continue
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        of_group_norm = "gn" in name.split(".")[-2]  # gn1, gn2, gn3, gnorm
        if name.endswith("running_var"):
            value = 1 + 0.3 * noise.abs()
        elif name.endswith("running_mean"):
            value = 0.2 * noise - 0.5
        elif of_group_norm:
            value = 0.3 + 0.1 * noise if name.endswith("weight") else 0.7 * noise
        elif name.endswith(("weight", "weight_v")) and t.dim() > 1:
            value = noise / t[0].numel() ** 0.5
        elif name.endswith("bias"):
            value = 0.3 + 0.2 * noise
        else:  # batch norm's weights, and norms of rows
            value = 0.8 + 0.2 * noise
        t.data.copy_(value)


def build(kind: str = "cls", branches: int = 2, *, seed: int = 1, **changes) -> MDEQNet:
    """A filled model in float64 with tight solvers, in training mode."""
    cfg = tiny_config(branches, **changes)
    with torch.random.fork_rng(devices=[]):
        model = NETS[kind](cfg).double()
    fill(model, seed)
    model.f_solver = model.b_solver = TIGHT
    return model


def images(*size: int, batch: int = 2, seed: int = 0, dtype=torch.float64) -> Tensor:
    """A batch of noise, (batch, 3, *size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def freeze_batch_norm(model: nn.Module) -> None:
    """Training mode, but batch norm uses and keeps its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; the plain norm where nothing is expected."""
    return ((found - expected).norm() / (expected.norm() or 1)).item()
