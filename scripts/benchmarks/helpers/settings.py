"""The published settings in the sizes of a benchmark, and the forms in which a step is computed."""

import re
import shlex
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
from yacs.config import CfgNode

from deq_sequence.options import parse
from lib.errors import InputError, did_you_mean
from mdeq_vision.config import config, update_config

ROOT = Path(__file__).parents[3]
LANGUAGE = ("wt103_deq_transformer", "wt103_deq_transformer_reg", "wt103_deq_transformer_preln_reg")
WT103_WORDS = 267_735
PUBLISHED_GPUS = 4  # the language runs name the batch of all GPUs


def image_settings() -> list[str]:
    """Names of the published image settings, such as 'cifar/cls_mdeq_TINY'."""
    folder = ROOT / "MDEQ-Vision/experiments"
    published = ("cifar", "imagenet", "cityscapes")
    files = [path for name in published for path in sorted((folder / name).glob("*.yaml"))]
    return [str(path.relative_to(folder).with_suffix("")) for path in files]


def chosen_settings(text: str) -> list[str]:
    """Names from a comma-separated list, in which language, images and all are groups.

    Raises:
        InputError: an unknown name, with the nearest known one.
    """
    groups = {"language": list(LANGUAGE), "images": image_settings()}
    groups["all"] = groups["language"] + groups["images"]
    names = []
    for word in text.split(","):
        if word not in groups and word not in groups["all"]:
            hint = did_you_mean(word, [*groups, *groups["all"]])
            raise InputError(f"--settings: unknown setting {word!r}{hint}")
        names += groups.get(word, [word])
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Form:
    """How a step is computed: in the plain form or ours, and the options of ours."""

    name: str
    plain: bool = False
    amp: str = "none"
    compile: bool = False
    graph: bool = False  # CUDA graphs
    adjoint: str = ""  # the solver of the adjoint; none: that of the setting


FORMS = {
    form.name: form
    for form in (
        Form("plain", plain=True),
        Form("fast"),
        Form("fast-bf16", amp="bf16"),
        Form("fast-compile", compile=True),
        Form("fast-graph", graph=True),
        Form("fast-gmres", adjoint="gmres"),
        Form("fast-bf16-compile", amp="bf16", compile=True),
    )
}


@dataclass
class Size:
    """What is changed of the published sizes; None leaves a size as published."""

    vocab: int = WT103_WORDS
    language: dict = field(default_factory=dict)  # flags of train_transformer.py
    image_batch: dict[str, int] = field(default_factory=dict)  # by data set
    image_size: dict[str, tuple[int, int]] = field(default_factory=dict)  # (width, height)
    widths: tuple[int, ...] | None = None  # channels of the branches


SIZES = {
    # The published share of one GPU.
    "full": Size(),
    # A step of some seconds on two CPU cores, at the published widths of f but for d_inner.
    "small": Size(
        language={"d_inner": 4800, "batch_size": 4},
        image_batch={"cifar10": 8, "imagenet": 2, "cityscapes": 2},
        image_size={"imagenet": (64, 64), "cityscapes": (96, 48)},
    ),
    # For tests.
    "tiny": Size(
        vocab=400,
        language={
            "d_model": 16,
            "d_embed": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "div_val": 2,
            "batch_size": 2,
            "tgt_len": 6,
            "mem_len": 8,
        },
        image_batch={"cifar10": 2, "imagenet": 2, "cityscapes": 2},
        image_size={"cifar10": (16, 16), "imagenet": (40, 40), "cityscapes": (48, 40)},
        widths=(8, 8, 16, 16),
    ),
}


@dataclass
class Options:
    """What the command line chooses for all settings."""

    size: Size
    device: torch.device
    dtype: torch.dtype = torch.float32
    plain: str = "published"  # solvers of the plain form: published or torchdeq
    seed: int = 1
    gain: float | None = None  # of the weights; None takes the setting's own
    lam: float | None = None  # absolute ridge of Anderson in every form; None: the default
    jac_freq: float | None = None  # None: as published
    batch: int | None = None
    vocab: int | None = None  # None: that of the size

    def __post_init__(self):
        self.vocab = self.vocab or self.size.vocab


def language_arguments(name: str, options: Options) -> Namespace:
    """The arguments of a published launch script, in the chosen sizes, for one GPU."""
    text = (ROOT / "DEQ-Sequence" / f"{name}.sh").read_text(encoding="utf-8")
    flags = shlex.split(re.search(r"settings=\((.*?)\)", text, re.DOTALL)[1])
    args = parse([flag for flag in flags if flag != "--cuda"])
    args.batch_size //= PUBLISHED_GPUS
    for key, value in options.size.language.items():
        setattr(args, key, value)
    args.batch_size = options.batch or args.batch_size
    return args


def image_config(name: str, options: Options, *, compile: bool = False) -> CfgNode:
    """The configuration of a published yaml file, in the chosen sizes."""
    cfg = config.clone()
    update_config(cfg, Namespace(cfg=ROOT / "MDEQ-Vision/experiments" / f"{name}.yaml"))
    cfg.defrost()
    size, data = options.size, cfg.DATASET.DATASET
    if data in size.image_size:
        cfg.MODEL.IMAGE_SIZE = cfg.TRAIN.IMAGE_SIZE = list(size.image_size[data])
    batch = size.image_batch.get(data, cfg.TRAIN.BATCH_SIZE_PER_GPU)
    cfg.TRAIN.BATCH_SIZE_PER_GPU = options.batch or batch
    cfg.COMPILE = compile
    stage = cfg.MODEL.EXTRA.FULL_STAGE
    if size.widths:
        stage.NUM_CHANNELS = list(size.widths[: stage.NUM_BRANCHES])
        if "HEAD_CHANNELS" in stage:
            stage.HEAD_CHANNELS, stage.FINAL_CHANSIZE = [4] * stage.NUM_BRANCHES, 16
    cfg.freeze()
    return cfg
