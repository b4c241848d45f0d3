"""Evaluation of a classification or segmentation model, over all processes of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Subset
from yacs.config import CfgNode

from lib.runs.processes import Processes
from lib.runs.training import EvaluationStopped, evaluating, summed_stats
from lib.solvers.precision import autocast
from lib.solvers.stats import SolverStats
from mdeq_vision.datasets import SegmentationDataset, make_loader, on_device
from mdeq_vision.inference import predict
from mdeq_vision.losses import SegmentationLoss
from mdeq_vision.metrics import ConfusionMatrix, topk_correct
from mdeq_vision.model import MDEQClsNet, MDEQNet, MDEQSegNet


@dataclass
class Evaluation:
    """The result of an evaluation: figures by name; for segmentation also a confusion matrix."""

    score: str  # name of the figure that ranks models
    images: int
    figures: dict[str, float]
    confusion: ConfusionMatrix | None = field(default=None, repr=False)

    def text(self) -> str:
        """The figures in one line; accuracies and mIoU as percentages."""
        figures = dict(self.figures)
        line = f"{self.images} images | loss {figures.pop('loss'):.4f}"
        nfe, residual = figures.pop("nfe"), figures.pop("rel_residual")
        figures.pop("abs_residual")
        radius = figures.pop("sradius", None)
        line += "".join(f" {name} {100 * value:.2f}%" for name, value in figures.items())
        line += f" | f res {residual:.2e} nfe {nfe:.1f}" if nfe else ""
        return line if radius is None else f"{line} | spectral radius {radius:.3f}"


def evaluate_classification(
    cfg: CfgNode,
    model: MDEQClsNet,
    dataset,
    *,
    train_step: int = -1,
    device: torch.device,
    processes: Processes,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss, top-1 and top-5 accuracy over ``dataset``, or its first TEST.NUM_SAMPLES images.

    Args:
        train_step: selects the phase as in the model's forward; -1 is the equilibrium phase.
        stop: called before each batch; True ends the evaluation.

    Raises:
        EvaluationStopped: ``stop`` returned True in some process; raised in all processes.
    """
    with evaluating(model) as stats:
        totals = _Totals(model, cfg, device, 3)  # loss, top-1, top-5
        for images, target in totals.until(stop, _batches(cfg, dataset, device, processes)):
            output = totals.forward(images, train_step).float()
            hits = topk_correct(output, target)
            loss = torch.nn.functional.cross_entropy(output, target, reduction="sum")
            totals.add(len(images), loss, hits[1], hits[5])
        count, *sums = totals.reduce(processes)
        names = ("loss", "top1", "top5")
        figures = {name: value / count for name, value in zip(names, sums, strict=True)}
        figures |= totals.solver_figures(stats, processes)
        return Evaluation("top1", int(count), figures)


def evaluate_segmentation(
    cfg: CfgNode,
    model: MDEQSegNet,
    dataset: SegmentationDataset,
    *,
    train_step: int = -1,
    device: torch.device,
    processes: Processes,
    on_prediction: Callable[[int, Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss, mean IoU and accuracies over ``dataset``, at the resolution of its items.

    Windows of TEST.IMAGE_SIZE cover larger images. TEST.MULTI_SCALE averages over TEST.SCALE_LIST,
    TEST.FLIP_TEST over mirror images. At scale 1, images are resized to the long side
    TEST.BASE_SIZE; but with TEST.CENTER_CROP_TEST the data set has resized and cropped them
    already, and the crop keeps its size. Without labels the figures are NaN.

    Args:
        on_prediction: called with (index, train ids (H, W) on the CPU) for each image of this
            process.
        train_step, stop: as in :func:`evaluate_classification`.

    Raises:
        EvaluationStopped: as in :func:`evaluate_classification`.
    """
    criterion = SegmentationLoss(
        class_weights=dataset.facts.class_weights, ignore_label=cfg.TRAIN.IGNORE_LABEL
    )
    confusion = ConfusionMatrix(cfg.DATASET.NUM_CLASSES, cfg.TRAIN.IGNORE_LABEL)
    cropped = cfg.TEST.CENTER_CROP_TEST
    scales = cfg.TEST.SCALE_LIST if cfg.TEST.MULTI_SCALE else [1.0]
    with evaluating(model) as stats:
        totals = _Totals(model, cfg, device, 2)  # loss, weight
        batches = _batches(cfg, _Numbered(dataset), device, processes)
        for indices, images, label in totals.until(stop, batches):
            probabilities = predict(
                lambda x: totals.forward(x, train_step),
                images,
                window=tuple(cfg.TEST.IMAGE_SIZE),
                base_size=max(images.shape[2:]) if cropped else cfg.TEST.BASE_SIZE,
                scales=scales,
                flip=cfg.TEST.FLIP_TEST,
            )
            prediction = probabilities.argmax(dim=1)
            # Log-probabilities serve as logits: softmax gives the same probabilities.
            totals.add(len(images), *criterion(probabilities.clamp_min(1e-30).log(), label))
            confusion.update(prediction, label)
            if on_prediction is not None:
                for index, train_ids in zip(indices.tolist(), prediction.cpu(), strict=True):
                    on_prediction(index, train_ids)
        count, loss, weight = totals.reduce(processes)
        confusion.reduce()
        figures = {
            "loss": loss / weight if weight else float("nan"),
            "mIoU": confusion.mean_iou,
            "pixel_accuracy": confusion.pixel_accuracy,
            "mean_accuracy": confusion.mean_accuracy,
        }
        figures |= totals.solver_figures(stats, processes)
        return Evaluation("mIoU", int(count), figures, confusion)


class _Totals:
    """Sums over the batches of one process: the number of images, and ``n`` more."""

    def __init__(self, model: MDEQNet, cfg: CfgNode, device: torch.device, n: int):
        self.model, self.autocast = model, partial(autocast, cfg.AMP, device)
        self.radius_too = cfg.DEQ.SPECTRAL_RADIUS_MODE
        self.sums = torch.zeros(1 + n, dtype=torch.float64, device=device)
        self.radii: list[float] = []  # one spectral radius per image
        self.stopped = False

    def until(self, stop: Callable[[], bool], batches: Iterator) -> Iterator:
        """Yield the batches until ``stop()`` returns True; note this in ``stopped``."""
        for batch in batches:
            if stop():
                self.stopped = True
                return
            yield batch

    def forward(self, images: Tensor, train_step: int) -> Tensor:
        with self.autocast():
            output, _, sradius = self.model(
                images,
                train_step=train_step,
                compute_jac_loss=False,
                spectral_radius_mode=self.radius_too,
            )
        if self.radius_too:
            self.radii += sradius.double().flatten().tolist()
        return output

    def add(self, images: int, *values: Tensor) -> None:
        self.sums[0] += images
        self.sums[1:] += torch.stack([value.double() for value in values])

    def reduce(self, processes: Processes) -> list[float]:
        """Return the sums over all processes.

        Raises:
            EvaluationStopped: the evaluation stopped early in some process.
        """
        stopped = self.sums.new_full((1,), self.stopped)
        *sums, stopped = processes.sum(torch.cat([self.sums, stopped])).tolist()
        if stopped:
            raise EvaluationStopped
        return sums

    def solver_figures(self, stats: SolverStats, processes: Processes) -> dict[str, float]:
        """Means of nfe, residuals and spectral radius over all processes."""
        means = summed_stats(stats, processes).forward.means()
        figures = {name: means[name] for name in ("nfe", "abs_residual", "rel_residual")}
        radii = torch.tensor([sum(self.radii), len(self.radii)], dtype=torch.float64)
        radius, count = processes.sum(radii).tolist()
        if count and means["nfe"]:
            figures["sradius"] = radius / count
        return figures


class _Numbered(torch.utils.data.Dataset):
    """Items (index, image, label); the index leads from a prediction to the image's name."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return index, *self.dataset[index]


def _batches(cfg: CfgNode, dataset, device, processes: Processes) -> Iterator[list[Tensor]]:
    if cfg.TEST.NUM_SAMPLES:
        dataset = Subset(dataset, range(min(cfg.TEST.NUM_SAMPLES, len(dataset))))
    loader = make_loader(
        dataset,
        batch_size=cfg.TEST.BATCH_SIZE_PER_GPU * processes.world_size,
        seed=cfg.SEED,
        epoch=0,
        shuffle=False,
        drop_last=False,
        rank=processes.rank,
        world_size=processes.world_size,
        workers=cfg.WORKERS,
        pin_memory=cfg.PIN_MEMORY and device.type == "cuda",
    )
    return on_device(loader, device)
