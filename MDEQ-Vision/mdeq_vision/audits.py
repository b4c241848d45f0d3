"""The audit of an image model: are its features a fixed point? See :mod:`lib.auditing`."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from lib.auditing import Audit, audit
from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from lib.runs.processes import Processes
from lib.runs.run_folder import WEIGHTS
from mdeq_vision.command import CONFIG, load_config
from mdeq_vision.datasets import CLASSIFICATION, get_cls_dataset, get_seg_dataset
from mdeq_vision.evaluation import evaluation_batches
from mdeq_vision.inference import predict
from mdeq_vision.model import MDEQClsNet, MDEQNet, MDEQSegNet


def audit_run(folder: Path, samples: int, device: torch.device) -> Audit:
    """Audit the best weights of a run on its first test images, with the run's own settings.

    A sample is an image. Its score is whether its class is right; of a segmentation, the share of
    labelled pixels that are right, at scale 1 and without mirror images. Its difficulty is the
    entropy of the model's own prediction. All arithmetic is float32.

    Raises:
        InputError: the folder holds no such run, its data are not there, or have no labels.
    """
    opts = ["TEST.NUM_SAMPLES", str(samples), "COMPILE", "False"]
    cfg = load_config(Namespace(cfg=folder / CONFIG, opts=opts))
    find = _classification if cfg.DATASET.DATASET in CLASSIFICATION else _segmentation
    model, dataset, forward, correct, measure = find(cfg)
    load_weights(model, folder / WEIGHTS)
    model.to(device)
    return audit(
        model,
        [tuple(batch) for batch in evaluation_batches(cfg, dataset, device, Processes())],
        correct=correct,
        difficulty=lambda p, target: _entropy(p),
        forward=forward,
        measure=measure,
    )


def _classification(cfg: CfgNode) -> tuple[MDEQNet, object, Callable, Callable, str]:
    model = MDEQClsNet(cfg)

    def forward(images: Tensor) -> Tensor:
        return model(images, compute_jac_loss=False)[0].softmax(dim=1)

    return (
        model,
        get_cls_dataset(cfg, "test"),
        forward,
        lambda p, target: p.argmax(dim=1) == target,
        "accuracy",
    )


def _segmentation(cfg: CfgNode) -> tuple[MDEQNet, object, Callable, Callable, str]:
    model, dataset = MDEQSegNet(cfg), get_seg_dataset(cfg, "test")
    if not dataset.has_labels:
        raise InputError(f"DATASET.TEST_SET {cfg.DATASET.TEST_SET} names images without labels")
    cropped = cfg.TEST.CENTER_CROP_TEST

    def forward(images: Tensor) -> Tensor:
        return predict(
            lambda x: model(x, compute_jac_loss=False)[0],
            images,
            window=tuple(cfg.TEST.IMAGE_SIZE),
            base_size=max(images.shape[2:]) if cropped else cfg.TEST.BASE_SIZE,
        )

    def correct(p: Tensor, label: Tensor) -> Tensor:
        counts = label != cfg.TRAIN.IGNORE_LABEL
        right = ((p.argmax(dim=1) == label) & counts).flatten(1).sum(dim=1)
        return right / counts.flatten(1).sum(dim=1).clamp(min=1)

    return model, dataset, forward, correct, "pixel accuracy"


def _entropy(p: Tensor) -> Tensor:
    """Entropy in nats of class probabilities (B, n, ...), the mean over an image: (B,)."""
    return torch.special.entr(p).sum(dim=1).view(len(p), -1).mean(dim=1)
