"""Pixel-wise cross-entropy for segmentation: over all pixels, or over hard pixels only."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import InputError, check


class SegmentationLoss:
    """Cross-entropy over the labelled pixels of a batch, as a sum and the weight that divides it.

    nll_i = -log softmax(logits_i)[y_i], and w are the class weights (1 if not given). All sums run
    over the pixels whose label is not ``ignore_label``.

    - Plain: total = sum_i w[y_i] nll_i, weight = sum_i w[y_i].
    - Online hard example mining (Shrivastava et al. 2016, arXiv 1604.03540, here per pixel):
      p_(0) <= ... <= p_(n-1) are the sorted probabilities of the true classes. The threshold is
      max(ohem_thres, p_(min(ohem_keep, n-1))). Pixels with p_i strictly below the threshold are
      kept: total = sum of w[y_i] nll_i over the kept pixels, weight = number of kept pixels.
      No pixel is kept if all p_i are equal and at least ohem_thres. As published, the n pixels
      are those of one call: each process and each part of its share of a batch has its own
      threshold.

    The mean loss is ``mean_loss(total, weight)``. Total and weight are returned separately, so
    that several processes can divide by the sum of their weights.

    Args:
        class_weights: one non-negative number per class, or None; moved to the logits' device.
        ignore_label: the label of pixels that do not count.
        ohem: keep hard pixels only.
        ohem_thres: a pixel is hard if the probability of its true class is below; in (0, 1].
        ohem_keep: keep at least this many pixels, if there are as many. Ties may reduce the number.

    Raises:
        InputError: an argument is out of range. In a call: shapes do not fit, labels are not
            int64, or a label is neither in [0, n) nor ``ignore_label``. Label values on a GPU are
            not checked, because every step would wait for the GPU; the data sets check their
            labels, and CUDA asserts.
    """

    def __init__(
        self,
        *,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        ohem: bool = False,
        ohem_thres: float = 0.9,
        ohem_keep: int = 100_000,
    ):
        check(0 < ohem_thres <= 1, "ohem_thres", ohem_thres, "in (0, 1]")
        check(ohem_keep >= 0, "ohem_keep", ohem_keep, "0 or more pixels")
        self.class_weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.float64)
            if weights.ndim != 1 or not (weights.isfinite() & (weights >= 0)).all():
                raise InputError(
                    f"class_weights must be finite numbers of 0 or more: {class_weights}"
                )
            self.class_weights = weights
        self.ignore_label = ignore_label
        self.ohem, self.ohem_thres, self.ohem_keep = ohem, ohem_thres, ohem_keep

    def __call__(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return (total, weight) of a batch, both 0-dim. Only total carries the graph.

        Args:
            logits: (B, n, h, w), any floating dtype, cast to float32 or wider. If the sizes
                differ, resized bilinearly (align_corners) to the label's size.
            label: (B, H, W), int64, in [0, n) or ``ignore_label``.
        """
        labelled = label != self.ignore_label
        self._check(logits, label, labelled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.shape[2:] != label.shape[1:]:
            logits = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=True)
        # reduction="none": the sum inside cross_entropy is not deterministic on a GPU.
        nll = F.cross_entropy(logits, label, ignore_index=self.ignore_label, reduction="none")
        some_class = label.masked_fill(~labelled, 0)  # a valid index for ignored pixels too
        loss, weight = nll, torch.ones_like(nll)  # (B, H, W) all
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(nll.device)  # once: a copy waits for the GPU
            weight = self.class_weights.to(nll.dtype)[some_class]
            loss = weight * nll
        if not self.ohem:
            # The loss of an ignored pixel is zero already.
            return loss.sum(), torch.where(labelled, weight, 0.0).sum()
        with torch.no_grad():
            p = logits.softmax(dim=1).gather(1, some_class[:, None]).squeeze(1)
            kept = labelled & (p < self._threshold(p, labelled))
        return torch.where(kept, loss, 0.0).sum(), kept.sum().to(nll.dtype)

    def weight(self, label: Tensor) -> Tensor | None:
        """The weight of a batch from its labels alone, 0-dim; None if it depends on the logits."""
        if self.ohem:
            return None
        labelled = label != self.ignore_label
        if self.class_weights is None:
            return labelled.sum()
        self.class_weights = self.class_weights.to(label.device)
        return torch.where(labelled, self.class_weights[label.masked_fill(~labelled, 0)], 0.0).sum()

    def _threshold(self, p: Tensor, labelled: Tensor) -> Tensor:
        """max(ohem_thres, p_(min(ohem_keep, n-1))) of the n labelled pixels.

        p has the shape of ``labelled``. The code never reads n: that would wait for the GPU.
        """
        candidates = p.masked_fill(~labelled, math.inf).flatten()
        # topk takes a fifth of the time of a full sort.
        k = min(self.ohem_keep + 1, candidates.numel())
        smallest = candidates.topk(k, largest=False, sorted=False).values
        # With fewer than k labelled pixels, the inf of ignored pixels is in ``smallest`` too.
        last = smallest.masked_fill(smallest == math.inf, -math.inf).max()
        return last.clamp(min=self.ohem_thres)

    def _check(self, logits: Tensor, label: Tensor, labelled: Tensor) -> None:
        if logits.ndim != 4 or label.ndim != 3 or len(logits) != len(label):
            raise InputError(
                f"logits {tuple(logits.shape)} and label {tuple(label.shape)} do not fit: "
                "(B, n, h, w) and (B, H, W) are expected"
            )
        if label.dtype != torch.int64:
            raise InputError(f"label has dtype {label.dtype}, but must be torch.int64")
        n_classes = logits.shape[1]
        if self.class_weights is not None and len(self.class_weights) != n_classes:
            raise InputError(
                f"class_weights has {len(self.class_weights)} numbers, "
                f"but the logits have {n_classes} classes"
            )
        if label.device.type != "cpu" or not labelled.any():
            return
        for value in label[labelled].aminmax():
            if not 0 <= value < n_classes:
                raise InputError(
                    f"label {int(value)} is neither a class in 0..{n_classes - 1} "
                    f"nor the ignore label {self.ignore_label}"
                )


def mean_loss(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, 0-dim. For zero weight: zero with zero gradients, not NaN."""
    return total / torch.where(weight > 0, weight, 1.0)
