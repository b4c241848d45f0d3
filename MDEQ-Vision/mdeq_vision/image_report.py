"""The report of a finished run: a table, curves, and for segmentation a picture of scenes."""

from pathlib import Path

import torch
from yacs.config import CfgNode

from lib.runs.checkpoint import load_weights
from lib.runs.figures import BEFORE, CURVES, draw_curves, series, solver_rows, table
from lib.runs.processes import Processes
from lib.runs.run_folder import WEIGHTS, peak_memory_mib, read_metrics
from mdeq_vision.datasets import SegmentationDataset, get_cls_dataset, get_seg_dataset
from mdeq_vision.evaluation import Evaluation, evaluate_classification, evaluate_segmentation
from mdeq_vision.model import MDEQClsNet, MDEQSegNet
from mdeq_vision.pictures import panel

SCENES = "scenes.png"
_SCENES_SHOWN = 4
_SRADIUS_IMAGES = 32  # test images for the mean spectral radius


def report_classification(cfg: CfgNode, folder: Path) -> str:
    """Evaluate a classification run's best weights; return a table, and draw the curves."""
    dataset = get_cls_dataset(cfg, "test")
    model = _best(MDEQClsNet(cfg), folder)

    def evaluate(cfg: CfgNode) -> Evaluation:
        return evaluate_classification(
            cfg, model, dataset, device=torch.device("cpu"), processes=Processes()
        )

    return _report(cfg, folder, evaluate, "accuracy")


def report_segmentation(cfg: CfgNode, folder: Path) -> str:
    """Evaluate a segmentation run's best weights; return a table, draw curves and scenes.png."""
    dataset = get_seg_dataset(cfg, "test")
    model = _best(MDEQSegNet(cfg), folder)
    predictions: dict[int, torch.Tensor] = {}

    def evaluate(cfg: CfgNode) -> Evaluation:
        return evaluate_segmentation(
            cfg,
            model,
            dataset,
            device=torch.device("cpu"),
            processes=Processes(),
            on_prediction=predictions.__setitem__,
        )

    text = _report(cfg, folder, evaluate, "mIoU")
    _draw_scenes(dataset, predictions, folder / SCENES)
    return f"{text}\nscenes: {folder / SCENES}"


def _best(model, folder: Path):
    load_weights(model, folder / WEIGHTS)
    return model


def _report(cfg: CfgNode, folder: Path, evaluate, title: str) -> str:
    records = read_metrics(folder)
    border = cfg.TRAIN.PRETRAIN_STEPS
    # Evaluate few images first: the scenes show the predictions of the last, full evaluation.
    few = cfg.clone()
    few.defrost()
    few.merge_from_list(["DEQ.SPECTRAL_RADIUS_MODE", True, "TEST.NUM_SAMPLES", _SRADIUS_IMAGES])
    radius = evaluate(few).figures["sradius"]
    best = evaluate(cfg)
    name, figures = best.score, best.figures
    draw_curves(records, border, folder / CURVES, lambda axes: draw_scores(axes, records, name))
    rows = [
        (f"{title} ({best.images} test images)", "valid", "test"),
        *_score_rows(records, name),
        ("", "", ""),
        *solver_rows(records, border, figures),
        ("", "", ""),
        (f"spectral radius ({_SRADIUS_IMAGES} images)", f"{radius:.3f}", ""),
        ("peak memory", f"{peak_memory_mib(torch.device('cpu')):.0f} MiB", ""),
    ]
    return "\n".join([*table(rows), "", f"curves: {folder / CURVES}"])


def _score_rows(records: list[dict], name: str) -> list[tuple[str, str, str]]:
    """Rows with validation and test scores: of each phase's end, and of the best weights."""
    valid = {r["step"]: r for r in records if r["kind"] == "valid"}
    tested = {r["weights"]: r for r in records if r["kind"] == "final_test"}
    phase = valid[tested["best"]["of_step"]]["phase"]
    rows = []
    if before := [r for r in valid.values() if r["phase"] != phase]:
        rows.append((BEFORE, f"{100 * before[-1][name]:.2f}%", ""))
    for which, title in (("last", "end of training"), ("best", "best in validation")):
        record = tested[which]
        scores = (f"{100 * r[name]:.2f}%" for r in (valid[record["of_step"]], record))
        rows.append((f"{phase} ({title}, step {record['of_step']})", *scores))
    return rows


def draw_scores(axes, records: list[dict], name: str) -> None:
    """Plot training accuracy and validation score, in percent, over the steps."""
    for kind, key, style in (("train", "accuracy", "-"), ("valid", name, "o-")):
        steps, scores = series(records, kind, key)
        label = "training accuracy" if kind == "train" else f"validation {key}"
        axes.plot(steps, [100 * score for score in scores], style, label=label)
    axes.set(ylabel="percent")


def _draw_scenes(dataset: SegmentationDataset, predictions: dict, path: Path) -> None:
    rows = [
        (dataset.picture(i), dataset[i][1].numpy(), predictions[i].numpy())
        for i in range(min(_SCENES_SHOWN, len(dataset)))
    ]
    facts = dataset.facts
    panel(rows, ("input", "truth", "prediction"), facts.class_names, facts.palette, path)
