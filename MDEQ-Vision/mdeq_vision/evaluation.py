"""Evaluation of a classification or segmentation model, over all processes of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Subset
from yacs.config import CfgNode

from lib.runs.evaluation_loop import evaluate_batches
from lib.runs.processes import Processes
from lib.solvers.precision import autocast
from mdeq_vision.class_predictions import Prediction
from mdeq_vision.datasets import SegmentationDataset, make_loader, on_device
from mdeq_vision.inference import predict
from mdeq_vision.losses import SegmentationLoss
from mdeq_vision.metrics import ConfusionMatrix, topk_correct
from mdeq_vision.model import MDEQClsNet, MDEQNet, MDEQSegNet

LESS_MEMORY = "lower TEST.BATCH_SIZE_PER_GPU or TEST.IMAGE_SIZE"  # advice for an evaluation


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
    on_prediction: Callable[[Prediction], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss, top-1 and top-5 accuracy over ``dataset``, or its first TEST.NUM_SAMPLES images.

    Args:
        on_prediction: called for each image of this process.
        train_step: selects the phase as in the model's forward; -1 is the equilibrium phase.
        stop: called before each batch; True ends the evaluation.

    Raises:
        EvaluationStopped: ``stop`` returned True in some process; raised in all processes.
    """
    forward = partial(_forward, model, cfg, device, train_step)

    def measure(batch: list[Tensor]) -> dict:
        indices, images, target = batch
        output, radius = forward(images)
        output = output.float()
        if on_prediction is not None:
            columns = (indices, target, *reversed(output.softmax(dim=1).max(dim=1)))
            for values in zip(*(column.tolist() for column in columns), strict=True):
                on_prediction(Prediction(*values))
        loss = torch.nn.functional.cross_entropy(output, target, reduction="sum")
        hits = topk_correct(output, target)
        return {"images": len(images), "loss": loss, "top1": hits[1], "top5": hits[5], **radius}

    batches = evaluation_batches(cfg, _Numbered(dataset), device, processes)
    sums, means = evaluate_batches(model, batches, measure, processes=processes, stop=stop)
    figures = {name: sums[name] / sums["images"] for name in ("loss", "top1", "top5")}
    return Evaluation("top1", int(sums["images"]), figures | _solver_figures(sums, means))


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
    forward = partial(_forward, model, cfg, device, train_step)

    def measure(batch: list[Tensor]) -> dict:
        indices, images, label = batch
        radii: list[dict] = []

        def logits(x: Tensor) -> Tensor:
            output, radius = forward(x)
            radii.append(radius)
            return output

        probabilities = predict(
            logits,
            images,
            window=tuple(cfg.TEST.IMAGE_SIZE),
            base_size=max(images.shape[2:]) if cropped else cfg.TEST.BASE_SIZE,
            scales=scales,
            flip=cfg.TEST.FLIP_TEST,
        )
        prediction = probabilities.argmax(dim=1)
        confusion.update(prediction, label)
        if on_prediction is not None:
            for index, train_ids in zip(indices.tolist(), prediction.cpu(), strict=True):
                on_prediction(index, train_ids)
        # Log-probabilities serve as logits: softmax gives the same probabilities.
        loss, weight = criterion(probabilities.clamp_min(1e-30).log(), label)
        sums = {"images": len(images), "loss": loss, "weight": weight}
        return sums | {name: sum(radius[name] for radius in radii) for name in radii[0]}

    batches = evaluation_batches(cfg, _Numbered(dataset), device, processes)
    sums, means = evaluate_batches(model, batches, measure, processes=processes, stop=stop)
    confusion.reduce()
    figures = {
        "loss": sums["loss"] / sums["weight"] if sums["weight"] else float("nan"),
        "mIoU": confusion.mean_iou,
        "pixel_accuracy": confusion.pixel_accuracy,
        "mean_accuracy": confusion.mean_accuracy,
    }
    figures |= _solver_figures(sums, means)
    return Evaluation("mIoU", int(sums["images"]), figures, confusion)


def _forward(
    model: MDEQNet, cfg: CfgNode, device: torch.device, train_step: int, images: Tensor
) -> tuple[Tensor, dict]:
    """The model's output for images (B, 3, H, W), and sums of spectral radii.

    With DEQ.SPECTRAL_RADIUS_MODE the sums are "radius", and "radii", their number; else none.
    """
    radius_too = cfg.DEQ.SPECTRAL_RADIUS_MODE
    with autocast(cfg.AMP, device):
        output, _, sradius = model(
            images,
            train_step=train_step,
            compute_jac_loss=False,
            spectral_radius_mode=radius_too,
        )
    sums = {"radius": sradius.double().sum(), "radii": sradius.numel()}
    return output, sums if radius_too else {}


def _solver_figures(sums: dict[str, float], means: dict[str, float]) -> dict[str, float]:
    """Means of nfe and residuals, and the mean spectral radius if there is an equilibrium."""
    figures = {name: means[name] for name in ("nfe", "abs_residual", "rel_residual")}
    if "radii" in sums and means["nfe"]:
        figures["sradius"] = sums["radius"] / sums["radii"]
    return figures


class _Numbered(torch.utils.data.Dataset):
    """Items (index, image, label); the index leads from a prediction to the image's name."""

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return index, *self.dataset[index]


def evaluation_batches(
    cfg: CfgNode, dataset, device: torch.device, processes: Processes
) -> Iterator[list[Tensor]]:
    """The batches of this process of ``dataset``, or of its first TEST.NUM_SAMPLES items."""
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
