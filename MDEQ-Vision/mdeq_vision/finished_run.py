"""Batches of a run's training data, with its trainer, for single steps."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from lib.runs.processes import Processes
from mdeq_vision.command import CONFIG, load_config
from mdeq_vision.datasets import CLASSIFICATION
from mdeq_vision.image_trainer import ImageTrainer
from mdeq_vision.model import MDEQClsNet, MDEQSegNet
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer

Batch = list[Tensor]
# For single steps: nothing is compiled, no workers, one stage, all images.
_CHANGES = "COMPILE False GRAPH False AMP none WORKERS 0 TRAIN.EXTRA_EPOCH 0 PERCENT 1.0".split()


def training_of(
    folder: Path, weights: Path, number: int, device: torch.device
) -> tuple[ImageTrainer, int, Iterator[Batch]]:
    """A trainer at equilibrium, the forward threshold of its steps, and its first batches.

    The batches are those with which training began, for one device. Half precision is off.

    Raises:
        InputError: the folder holds no such run, its data are not there or too few, or the weights
            are of another model.
    """
    cfg = load_config(Namespace(cfg=folder / CONFIG, opts=_CHANGES))
    of_images = cfg.DATASET.DATASET in CLASSIFICATION
    model = (MDEQClsNet if of_images else MDEQSegNet)(cfg)
    load_weights(model, weights)
    task = ClassificationTrainer if of_images else SegmentationTrainer
    data = (task.get_dataset(cfg, split) for split in ("train", "valid"))
    trainer = task(cfg, model.to(device), *data, device, [], Processes())
    trainer.step = -1  # no step of the stacked phase
    if trainer.n_batches < number:
        raise InputError(
            f"the training images fill {trainer.n_batches} batches, but {number} are asked for"
        )
    return trainer, cfg.DEQ.F_THRES, _first(trainer, number)


def _first(trainer: ImageTrainer, number: int) -> Iterator[Batch]:
    batches = trainer.batches()
    for _ in range(number):
        batch = next(batches)
        yield batch
        trainer.advance(batch, 0.0)
