"""The two tasks: what classification and segmentation add to the trainer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.sync_batchnorm import convert_sync_batchnorm
from mdeq_vision.evaluation import evaluate_classification, evaluate_segmentation
from mdeq_vision.losses import SegmentationLoss
from mdeq_vision.metrics import topk_correct
from mdeq_vision.training import Trainer


class ClassificationTrainer(Trainer):
    """Cross-entropy, top-1 accuracy."""

    evaluator = staticmethod(evaluate_classification)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(output, target, reduction="sum")
        return total, torch.full_like(total, len(target))

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        hits = topk_correct(output, target, (1,))[1]
        return hits, torch.full_like(hits, len(target))


class SegmentationTrainer(Trainer):
    """Class-weighted cross-entropy or OHEM; batch norm over all processes."""

    drop_last = True
    evaluator = staticmethod(evaluate_segmentation)

    def __init__(self, cfg, model, train_set, valid_set, device, gpus, processes):
        if processes.world_size > 1:
            model = convert_sync_batchnorm(model)
        super().__init__(cfg, model, train_set, valid_set, device, gpus, processes)
        self.criterion = SegmentationLoss(
            class_weights=train_set.facts.class_weights,
            ignore_label=cfg.TRAIN.IGNORE_LABEL,
            ohem=cfg.LOSS.USE_OHEM,
            ohem_thres=cfg.LOSS.OHEMTHRES,
            ohem_keep=cfg.LOSS.OHEMKEEP,
        )

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.criterion(output, target)

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """At the resolution of the logits: enough for the log, and cheap."""
        small = F.interpolate(target[:, None].float(), output.shape[-2:], mode="nearest")
        small = small.squeeze(1).long()
        hits = (output.argmax(dim=1) == small).sum()
        return hits, (small != self.cfg.TRAIN.IGNORE_LABEL).sum()
