"""Metrics: top-k counts for classification, a confusion matrix for segmentation."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lib.errors import InputError, check


def topk_correct(output: Tensor, target: Tensor, topk: Sequence[int] = (1, 5)) -> dict[int, Tensor]:
    """For each k, count the samples whose true class is among the k highest scores.

    Args:
        output: scores, (B, n); the batch may be empty.
        target: true classes, (B,), any integer dtype.
        topk: the values of k, each at least 1; a k above n counts as n.

    Returns:
        For each k in ``topk``, a 0-dim int64 tensor on the device of ``output``.

    Raises:
        InputError: the shapes do not fit, or ``topk`` is empty or has a value below 1.
    """
    if output.ndim != 2 or target.shape != output.shape[:1]:
        raise InputError(
            f"output {tuple(output.shape)} and target {tuple(target.shape)} do not fit: "
            "(B, n) and (B,) are expected"
        )
    check(len(topk) > 0 and min(topk) >= 1, "topk", tuple(topk), "numbers of at least 1")
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices  # (B, k), best first
    hit = best == target[:, None]
    return {k: hit[:, :k].sum() for k in topk}


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over pixels, and the metrics computed from them.

    ``matrix`` is (n, n), int64: ``matrix[i, j]`` is the number of pixels of class i that were
    predicted as j. Pixels whose label is ``ignore_label`` do not count.

    Args:
        n_classes: number of classes n.
        ignore_label: the label of pixels that do not count.
    """

    def __init__(self, n_classes: int, ignore_label: int = 255):
        check(n_classes >= 1, "n_classes", n_classes, "at least 1")
        self.n_classes, self.ignore_label = n_classes, ignore_label
        self.matrix = torch.zeros(n_classes, n_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of a batch. The matrix moves to the batch's device.

        Args:
            prediction: predicted classes, any shape and integer dtype, in [0, n) where labelled.
            label: true classes, of the same shape, in [0, n) or ``ignore_label``.

        Raises:
            InputError: shapes differ, or a value on the CPU is out of range. Values on a GPU are
                not checked, because every batch would wait for the GPU.
        """
        if prediction.shape != label.shape:
            raise InputError(
                f"prediction has shape {tuple(prediction.shape)}, "
                f"but label has {tuple(label.shape)}"
            )
        # Cast to int64 first: n * label overflows in uint8, and -1 would be 255.
        label, prediction = label.long().flatten(), prediction.long().flatten()
        labelled = label != self.ignore_label
        if label.device.type == "cpu":
            for name, values in (("label", label), ("prediction", prediction)):
                self._check(name, values[labelled])
        cells = self.n_classes**2
        # Ignored pixels go to one extra cell. Selecting the labelled pixels instead would wait for
        # the GPU.
        pairs = torch.where(labelled, label * self.n_classes + prediction, cells)
        counts = torch.zeros(cells + 1, dtype=torch.int64, device=pairs.device)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        self.matrix = self.matrix.to(counts.device) + counts[:cells].view(self.n_classes, -1)

    def reduce(self) -> "ConfusionMatrix":
        """Replace the counts by their sum over all processes, once, at the end; return self."""
        if dist.is_available() and dist.is_initialized():
            # NCCL needs GPU tensors; the matrix of a process that counted nothing is on the CPU.
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            matrix = self.matrix.to(device, copy=True)
            dist.all_reduce(matrix)
            self.matrix = matrix
        return self

    @property
    def iou(self) -> Tensor:
        """Intersection over union per class, (n,), float64; NaN for a class that never occurs."""
        matrix = self._counts()
        hits = matrix.diagonal()
        return hits / (matrix.sum(1) + matrix.sum(0) - hits)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur in labels or predictions; NaN if none does."""
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of labelled pixels with the right prediction; NaN if no pixel is labelled."""
        matrix = self._counts()
        return (matrix.diagonal().sum() / matrix.sum()).item()

    @property
    def mean_accuracy(self) -> float:
        """Mean recall over the classes that occur in labels; NaN if none does."""
        matrix = self._counts()
        return (matrix.diagonal() / matrix.sum(1)).nanmean().item()

    def table(self, class_names: Sequence[str]) -> str:
        """One line per class: its name and IoU in percent; "-" if the class never occurs."""
        if len(class_names) != self.n_classes:
            raise InputError(
                f"class_names has {len(class_names)} names, but there are {self.n_classes} classes"
            )
        width = max(map(len, class_names))
        return "\n".join(
            f"{name:<{width}}  " + (f"{'-':>6}" if math.isnan(iou) else f"{100 * iou:6.2f}")
            for name, iou in zip(class_names, self.iou.tolist(), strict=True)
        )

    def _counts(self) -> Tensor:
        return self.matrix.cpu().double()  # exact up to 2**53 pixels

    def _check(self, name: str, values: Tensor) -> None:
        for value in torch.stack(values.aminmax()).tolist() if values.numel() else []:
            if not 0 <= value < self.n_classes:
                hint = f" nor the ignore label {self.ignore_label}" if name == "label" else ""
                raise InputError(
                    f"{name} {value} is {'neither' if hint else 'not'} "
                    f"a class in 0..{self.n_classes - 1}{hint}"
                )
