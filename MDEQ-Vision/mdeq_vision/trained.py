"""The use of a trained image model: load it, and let it classify or segment pictures.

import mdeq_vision
digits = mdeq_vision.load("docs/models/digits.safetensors")
print(digits.classify("three.png").best(3))
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lib.errors import InputError, naming
from lib.gradients import unused_settings
from lib.runs.checkpoint import load_state
from lib.runs.figures import finite
from lib.runs.model_file import ModelFile, find_device, read_model_file
from mdeq_vision.classes_file import CLASSES, check_classes, classes_of, facts_of, read_classes
from mdeq_vision.config import CONFIG, config, config_of, flat, update_config
from mdeq_vision.datasets import CLASSIFICATION, get_cls_dataset, get_seg_dataset
from mdeq_vision.model import MDEQClsNet, MDEQSegNet
from mdeq_vision.prediction.predictors import TrainedClassifier, TrainedSegmenter

CLASSIFIER, SEGMENTER = "image classification", "segmentation"  # the kinds of models
# Settings that name places on the machine of the run.
_PLACES = """
    OUTPUT_DIR LOG_DIR DATA_DIR DATASET.ROOT MODEL.PRETRAINED TRAIN.CHECKPOINT TRAIN.MODEL_FILE
    TEST.MODEL_FILE
""".split()
# Settings that a card shows: those that shape the model and its training.
_SHOWN = """
    MODEL.NUM_LAYERS MODEL.DOWNSAMPLE_TIMES MODEL.EXPANSION_FACTOR
    MODEL.NUM_GROUPS MODEL.WNORM MODEL.DROPOUT MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS
    MODEL.EXTRA.FULL_STAGE.NUM_BLOCKS DEQ.F_SOLVER DEQ.F_THRES DEQ.STOP_MODE DEQ.F_START DEQ.GRAD
    DEQ.B_SOLVER DEQ.B_THRES TRAIN.PRETRAIN_STEPS TRAIN.END_EPOCH TRAIN.BATCH_SIZE_PER_GPU
    TRAIN.OPTIMIZER TRAIN.LR TRAIN.LR_SCHEDULER TRAIN.WD LOSS.PRETRAIN_JAC_LOSS_WEIGHT
    LOSS.JAC_LOSS_WEIGHT LOSS.JAC_LOSS_FREQ SEED
""".split()
_DATA = {
    "digits": "70 % of the 1797 handwritten digits of scikit-learn; bright ink on dark ground",
    "digit_scenes": "drawn scenes of several handwritten digits, those of scikit-learn",
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet, or folders of pictures like its",
    "cityscapes": "Cityscapes",
    "own_pictures": "folders of its user's own pictures",
    "own_scenes": "scenes of its user's own",
}
_OF_TASK = {
    CLASSIFIER: ("MODEL.IMAGE_SIZE",),
    SEGMENTER: ("TRAIN.IMAGE_SIZE", "TEST.IMAGE_SIZE", "TEST.BASE_SIZE"),
}
_PICTURES = {"digits": "docs/figures/digit.png", "digit_scenes": "docs/figures/scene.png"}


def load(
    path: str | Path, device: str | torch.device = "cpu"
) -> TrainedClassifier | TrainedSegmenter:
    """Load a trained image model: a run's folder, or a file of scripts/export_weights.py.

    Raises:
        InputError: there is no such model or device, or the file is damaged.
    """
    device = find_device(device)
    found = read_model_file(path, "", of_run)
    if found.kind not in (CLASSIFIER, SEGMENTER):
        raise InputError(f"{path} is for {found.kind}, not for images: give another model")
    return build(found, device)


def build(found: ModelFile, device: torch.device) -> TrainedClassifier | TrainedSegmenter:
    """The model that a file or a run describes, in evaluation mode."""
    source, settings = str(found.path), dict(found.settings)
    classes, is_classifier = settings.pop("CLASSES", []), found.kind == CLASSIFIER
    cfg = config_of({**settings, "COMPILE": False}, source)
    expected = cfg.MODEL.NUM_CLASSES if is_classifier else cfg.DATASET.NUM_CLASSES
    try:
        check_classes(classes, coloured=not is_classifier)
        whole = [entry["name"] for entry in classes] == found.names
    except ValueError:
        whole = False
    if not whole or len(classes) > expected:
        raise InputError(f"{source} is damaged: its classes do not fit its settings")
    with torch.random.fork_rng(devices=[]), naming(source):  # the initial weights are replaced
        model = (MDEQClsNet if is_classifier else MDEQSegNet)(cfg)
    load_state(model, found.state, source)
    model = model.to(device).eval()
    if is_classifier:
        return TrainedClassifier(model, found.names, cfg, found.figures)
    facts = facts_of(classes, cfg.DATASET.DATASET)
    return TrainedSegmenter(model, found.names, cfg, found.figures, facts)


def of_run(folder: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Kind, settings and class names of the run in a folder, for :mod:`lib.runs.model_file`.

    The settings are as ``config_of`` takes them, without places on this machine, and have the
    content of classes.json in CLASSES. The classes of an older run, without that file, are those
    of its data.

    Raises:
        InputError: the folder holds no run of images, or its classes are lost.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no run of MDEQ-Vision: {CONFIG} is missing")
    cfg = config.clone()
    with naming(str(path)):
        update_config(cfg, Namespace(cfg=path))
    is_classifier = cfg.DATASET.DATASET in CLASSIFICATION
    file = folder / CLASSES
    if file.is_file():
        classes = read_classes(file, coloured=not is_classifier)
    else:
        get = get_cls_dataset if is_classifier else get_seg_dataset
        try:
            classes = classes_of(get(cfg, "test"))
        except InputError as error:
            raise InputError(
                f"{file} is missing, and the data of the run, from which the classes could be "
                f"read, cannot be used ({error}): restore one of them"
            ) from error
    settings = json.loads(json.dumps(cfg))
    for name in _PLACES:
        *sections, key = name.split(".")
        place = settings
        for section in sections:
            place = place[section]
        place[key] = ""
    kind = CLASSIFIER if is_classifier else SEGMENTER
    return kind, {**settings, "CLASSES": classes}, [entry["name"] for entry in classes]


def facts(found: ModelFile) -> dict[str, Any]:
    """What the card of a model says (scripts/model_card.py)."""
    trained = build(found, torch.device("cpu"))
    settings, names = flat(trained.settings), trained.classes
    dataset = trained.settings.DATASET.DATASET
    verb = "classify" if found.kind == CLASSIFIER else "segment"
    unused = {f"DEQ.{name.upper()}" for name in unused_settings(trained.model.grad)}
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    shows = "print(found.best(3))" if verb == "classify" else "print(found.shares)"
    return {
        "title": f"An MDEQ trained on {dataset.replace('_', ' ')}",
        "about": (
            f"A model for {found.kind} (arXiv 2006.08656): its features at "
            f"{len(trained.model.channels)} resolutions are the fixed point of one layer f. "
            f"{len(names)} classes: {shown}."
        ),
        "equation": "z = f(z; x), with x the features of the image that its first layers give",
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "figures": _figures(found.figures),
        "settings": {
            name: settings[name]
            for name in (*_OF_TASK[found.kind], *_SHOWN)
            if settings.get(name) not in (None, [], "") and name not in unused
        },
        "data": f"{_DATA[dataset]} (`DATASET.DATASET {dataset}`).",
        "use": (
            "import mdeq_vision\n\n"
            'model = mdeq_vision.load("NAME")\n'
            f'found = model.{verb}("picture.png")\n'
            f"{shows}"
        ),
        "samples": "the first images of the test data",
        "measures": {
            "accuracy": "the share of images whose class is right",
            "pixel accuracy": "the share of an image's pixels whose class is right, the mean",
        },
        "difficulty": "the entropy of the model's own prediction",
        **({"picture": _PICTURES[dataset]} if dataset in _PICTURES else {}),
    }


def _figures(figures: dict[str, dict]) -> dict[str, str]:
    """Rows of the card: of the test, where there is one, else of the last validation.

    A figure that is not finite, such as the mean IoU where no class occurs, has no row.
    """
    names = {"top1": "accuracy", "top5": "accuracy, five best", "mIoU": "mean IoU"}
    names |= {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy of the classes"}
    rows = {}
    final = {name: record for name, record in figures.items() if name.startswith("final_")}
    for kind, record in (final or figures).items():
        split = kind.removeprefix("final_")
        record = finite(record)
        rows |= {
            f"{name} ({split})": f"{100 * record[key]:.2f} %"
            for key, name in names.items()
            if key in record
        }
        if record.get("nfe"):
            rows[f"evaluations of f ({split})"] = f"{record['nfe']:.1f}"
        if record.get("nfe") and "rel_residual" in record:
            rows[f"relative residual ({split})"] = f"{record['rel_residual']:.1e}"
    return rows
