"""The trainers of the two tasks: classification and segmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mdeq_vision.datasets import get_cls_dataset, get_seg_dataset
from mdeq_vision.evaluation import evaluate_classification, evaluate_segmentation
from mdeq_vision.image_trainer import ImageTrainer
from mdeq_vision.losses import SegmentationLoss
from mdeq_vision.metrics import topk_correct


class ClassificationTrainer(ImageTrainer):
    """Trains with cross-entropy; reports top-1 accuracy."""

    evaluator = staticmethod(evaluate_classification)
    get_dataset = staticmethod(get_cls_dataset)

    def weight(self, target: Tensor) -> Tensor:
        return torch.tensor(len(target), device=target.device)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(output, target, reduction="sum")
        return total, torch.full_like(total, len(target))

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        hits = topk_correct(output, target, (1,))[1]
        return hits, torch.full_like(hits, len(target))


class SegmentationTrainer(ImageTrainer):
    """Trains with class-weighted cross-entropy or OHEM; reports pixel accuracy."""

    drop_last = one_gpu = True
    evaluator = staticmethod(evaluate_segmentation)
    get_dataset = staticmethod(get_seg_dataset)

    def __init__(self, cfg, model, train_set, *args, **kwargs):
        super().__init__(cfg, model, train_set, *args, **kwargs)
        self.valid_set.check_batches(cfg)
        self.criterion = SegmentationLoss(
            class_weights=train_set.facts.class_weights,
            ignore_label=cfg.TRAIN.IGNORE_LABEL,
            ohem=cfg.LOSS.USE_OHEM,
            ohem_thres=cfg.LOSS.OHEMTHRES,
            ohem_keep=cfg.LOSS.OHEMKEEP,
        )

    def weight(self, target: Tensor) -> Tensor | None:
        return self.criterion.weight(target)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.criterion(output, target)

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Count at the resolution of the logits: cheap, and good enough for the log."""
        small = F.interpolate(target[:, None].float(), output.shape[-2:], mode="nearest")
        small = small.squeeze(1).long()
        hits = (output.argmax(dim=1) == small).sum()
        return hits, (small != self.cfg.TRAIN.IGNORE_LABEL).sum()
