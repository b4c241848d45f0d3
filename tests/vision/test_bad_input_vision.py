"""Bad input to the image tools: one clear line that names the thing, exit code 2, nothing written.

``python tests/vision/test_bad_input_vision.py`` runs these cases and prints them as a table.
"""

import math
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from image_files import noise, write_cifar10, write_cityscapes, write_imagenet
from lib.checkpoint import load
from lib.distributed import Processes
from lib.experiment import CHECKPOINT, LOG, METRICS, WEIGHTS, read_metrics
from mdeq_vision import command
from mdeq_vision.command import CONFIG
from mdeq_vision.datasets import digit_scenes
from mdeq_vision.datasets.cityscapes_lists import write_lists
from small_runs import DIGITS, ROOM, SCENES, TINY, TINY_DIGITS, run_tool

TRAP = "executed"  # what the code in a malicious file would create
PROGRAMS = {"extract": "extract_pretrained.py"}
STAGE = "MODEL.EXTRA.FULL_STAGE"

# Two narrow branches, and one epoch of two steps, where something is refused on the way.
NARROW = f"{STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4] {STAGE}.NUM_BLOCKS [1,1]".split()
NARROW += f"{STAGE}.NUM_BRANCHES 2 {STAGE}.BIG_KERNELS [0,0] WORKERS 0".split()
CITYSCAPES = """
    DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 DATASET.TRAIN_SET list/cityscapes/train.lst
    DATASET.TEST_SET list/cityscapes/val.lst TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 64
    TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64 TEST.BATCH_SIZE_PER_GPU 2
    TRAIN.BATCH_SIZE_PER_GPU 2 TRAIN.PRETRAIN_STEPS 0 SAVE_FREQ 0
""".split()
IMAGENET = """
    DATASET.DATASET imagenet DATASET.TEST_SET val MODEL.NUM_CLASSES 3 MODEL.IMAGE_SIZE [16,16]
    TRAIN.PRETRAIN_STEPS 0 TRAIN.BATCH_SIZE_PER_GPU 3 SAVE_FREQ 0
""".split()


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def tool(name: str, argv: list[str]) -> int:
    """Any of the tools in this process; its exit code."""
    if name != "make_cityscapes_lists":
        return run_tool(name, *argv)
    try:
        return runpy.run_path(str(ROOM / "tools" / f"{name}.py"))["main"](argv)
    except SystemExit as error:
        return error.code


class Place:
    """Where one case happens: small data sets and finished runs to damage."""

    def __init__(self, folder: Path, finished: Path, monkeypatch):
        self.folder, self.finished, self.monkeypatch = folder, finished, monkeypatch
        self.output, self.data = folder / "output", folder / "data"

    def run(self, kind: str) -> Path:
        """A finished run of 'digits' or 'digit_scenes', in the output folder."""
        (source,) = (self.finished / kind).iterdir()
        target = self.output / kind / source.name
        if not target.exists():
            shutil.copytree(source, target)
        return target

    def digits(self, *more) -> list[str]:
        return ["--cfg", str(DIGITS), "--modelDir", str(self.output), *TINY_DIGITS, *NARROW, *more]

    def scenes(self, *more) -> list[str]:
        sizes = ["PERCENT", "0.3", "TRAIN.IMAGE_SIZE", "[32,32]"]
        places = ["--cfg", str(SCENES), "--modelDir", str(self.output)]
        return [*places, *TINY, *sizes, *NARROW, *more]

    def cityscapes(self, *more) -> list[str]:
        """Settings for a small tree, which is written if there is none."""
        if not (self.data / "cityscapes").exists():
            write_cityscapes(self.data, size=(64, 32))
        return self.scenes("PERCENT", "1", *CITYSCAPES, "DATASET.ROOT", str(self.data), *more)

    def imagenet(self, *more) -> list[str]:
        if not (self.data / "images").exists():
            write_imagenet(self.data, per_class=2, size=(40, 30))
        return self.digits("PERCENT", "1", *IMAGENET, "DATASET.ROOT", str(self.data), *more)

    def cifar10(self, *more) -> list[str]:
        write_cifar10(self.data, per_batch=10)
        overrides = ["DATASET.DATASET", "cifar10", "DATASET.ROOT", str(self.data)]
        return self.digits(*overrides, *more)

    def file(self, pattern: str) -> Path:
        """The first file of the data that fits."""
        return sorted(self.data.rglob(pattern))[0]

    def yaml(self, edit, source: Path = DIGITS) -> str:
        """A changed copy of a settings file."""
        settings = yaml.safe_load(source.read_text())
        edit(settings)
        path = self.folder / "own.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def weights(self, edit, kind: str = "digits") -> str:
        """The weights of a run after ``edit`` changed the state dict; the run is not there."""
        (source,) = (self.finished / kind).iterdir()
        state = load(source / WEIGHTS)
        edit(state)
        path = self.folder / "weights.pt"
        torch.save(state, path)
        return str(path)

    def cut(self, path: Path) -> str:
        """Cut a file in half."""
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes most of the time of such a short run, and is tested elsewhere, is left out."""
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8})
    monkeypatch.setattr(command, "model_summary", lambda *arguments: "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs to copy: digits/NAME and digit_scenes/NAME."""
    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, folder, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8})
        short = ["TRAIN.END_EPOCH", "1"]
        assert run_tool("cls_train", *place.digits(*short)) == 0
        assert run_tool("seg_train", *place.scenes(*short)) == 0
    return folder / "output"


@pytest.fixture
def place(tmp_path, finished, monkeypatch):
    return Place(tmp_path, finished, monkeypatch)


# ---- the cases: each returns the tool, its arguments, and what the message must name ------------

CASES = {}


def case(title, late=False, xfail=None):
    """``late``: it shows only when the files are read, when a run has begun."""

    def add(function):
        marks = [pytest.mark.xfail(strict=True, reason=xfail)] if xfail else []
        CASES[title] = pytest.param(title, function, late, id=title, marks=marks)
        return function

    return add


# -- command line and settings


@case("no --cfg")
def _(place):
    return "cls_train", [], "--cfg"


@case("missing --cfg file")
def _(place):
    return "seg_test", ["--cfg", "experiments/nothing.yaml"], "experiments/nothing.yaml"


@case("--cfg is not YAML")
def _(place):
    path = place.folder / "own.yaml"
    path.write_text("MODEL: [1, 2\nTRAIN: {")
    return "cls_valid", ["--cfg", str(path)], str(path)


@case("--cfg holds no settings")
def _(place):
    path = place.folder / "own.yaml"
    path.write_text("just a line")
    return "seg_train", ["--cfg", str(path)], str(path)


@case("unknown yaml key")
def _(place):
    path = place.yaml(lambda s: s["TRAIN"].update(OPTIMISER="sgd"))
    return "cls_train", ["--cfg", path], f"TRAIN.OPTIMISER in {path}: did you mean TRAIN.OPTIMIZER?"


@case("unknown override")
def _(place):
    return "seg_train", place.scenes("TRAIN.END_EPOCHS", "3"), "did you mean TRAIN.END_EPOCH?"


@case("override of another type")
def _(place):
    return "cls_train", place.digits("TRAIN.LR", "fast"), "TRAIN.LR in the command line is 'fast'"


@case("override of a section")
def _(place):
    return "cls_valid", place.digits("MODEL", "big"), "MODEL in the command line is 'big'"


@case("override without a value")
def _(place):
    return "seg_test", place.scenes("TRAIN.LR"), "'TRAIN.LR' has no value"


@case("unknown flag")
def _(place):
    return "seg_train", place.scenes("--modeldir", "x"), "did you mean --modelDir?"


@case("unknown flag (extractor)")
def _(place):
    return "extract", ["--ckpt", "a", "b"], "--ckpt"


@case(
    "unknown flag (lists)",
    xfail="argparse's own parser prints its usage first: use options.Parser and exit_code",
)
def _(place):
    return "make_cityscapes_lists", ["--dataDir", "data"], "--dataDir"


@case("--percent 0")
def _(place):
    return "cls_train", [*place.digits(), "--percent", "0"], "--percent"


@case("--percent nan")
def _(place):
    return "cls_train", [*place.digits(), "--percent", "nan"], "--percent"


@case("--percent that is no number")
def _(place):
    return "cls_train", [*place.digits(), "--percent", "half"], "--percent"


@case("PERCENT out of range")
def _(place):
    return "cls_train", place.digits("PERCENT", "1.5"), "PERCENT is 1.5"


@case("unknown optimiser")
def _(place):
    return "cls_train", place.digits("TRAIN.OPTIMIZER", "adamw"), "TRAIN.OPTIMIZER is 'adamw'"


@case("negative weight decay")
def _(place):
    return "cls_train", place.digits("TRAIN.WD", "-0.1"), "TRAIN.WD"


@case(
    "NESTEROV without momentum",
    xfail="not checked: ValueError of torch",
)
def _(place):
    more = ["TRAIN.OPTIMIZER", "sgd", "TRAIN.NESTEROV", "True", "TRAIN.MOMENTUM", "0"]
    return "cls_train", place.digits(*more), "TRAIN.NESTEROV"


@case("image size that is not whole")
def _(place):
    return "seg_train", place.scenes("TRAIN.IMAGE_SIZE", "[32.5,32]"), "TRAIN.IMAGE_SIZE"


@case(
    "OHEM threshold out of range",
    xfail="config._RANGES has no LOSS.OHEMTHRES: named ohem_thres",
)
def _(place):
    return "seg_train", place.scenes("LOSS.OHEMTHRES", "2"), "OHEMTHRES"


# -- model


@case("unknown solver")
def _(place):
    return "cls_train", place.digits("DEQ.F_SOLVER", "newton"), "'newton'"


@case("NUM_GROUPS that does not divide")
def _(place):
    return "seg_train", place.scenes("MODEL.NUM_GROUPS", "3"), "MODEL.NUM_GROUPS"


@case("NUM_GROUPS 1")
def _(place):
    return "seg_train", place.scenes("MODEL.NUM_GROUPS", "1"), "MODEL.NUM_GROUPS"


@case("no FULL_STAGE")
def _(place):
    path = place.yaml(lambda s: s["MODEL"].pop("EXTRA"))
    return "cls_train", ["--cfg", path], "no MODEL.EXTRA.FULL_STAGE"


@case("FULL_STAGE lacks a key")
def _(place):
    path = place.yaml(lambda s: s["MODEL"]["EXTRA"]["FULL_STAGE"].pop("NUM_CHANNELS"))
    return "cls_train", ["--cfg", path], "FULL_STAGE lacks NUM_CHANNELS"


@case("a list shorter than NUM_BRANCHES")
def _(place):
    more = [f"{STAGE}.NUM_BLOCKS", "[1]"]
    return "cls_train", place.digits(*more), f"{STAGE}.NUM_BLOCKS is [1]"


@case("channels that are no numbers")
def _(place):
    more = [f"{STAGE}.NUM_CHANNELS", "[8,'many']"]
    return "cls_train", place.digits(*more), f"{STAGE}.NUM_CHANNELS"


@case("dropout out of range")
def _(place):
    return "cls_train", place.digits("MODEL.DROPOUT", "1.5"), "1.5"


# -- data


@case("unknown data set")
def _(place):
    return "cls_train", place.digits("DATASET.DATASET", "mnist"), "DATASET.DATASET 'mnist'"


@case("data set of the other task")
def _(place):
    return "seg_train", place.scenes("DATASET.DATASET", "cifar10"), "no segmentation data set"


@case("too few classes")
def _(place):
    return "cls_train", place.digits("MODEL.NUM_CLASSES", "5"), "MODEL.NUM_CLASSES is 5"


@case("wrong number of classes")
def _(place):
    return "seg_test", place.cityscapes("DATASET.NUM_CLASSES", "20"), "DATASET.NUM_CLASSES is 20"


@case("IGNORE_LABEL is a class")
def _(place):
    return "seg_train", place.scenes("TRAIN.IGNORE_LABEL", "3"), "TRAIN.IGNORE_LABEL 3"


@case("missing CIFAR-10")
def _(place):
    argv = place.digits("DATASET.DATASET", "cifar10", "DATASET.ROOT", str(place.data))
    return "cls_train", argv, str(place.data / "cifar-10-batches-py")


@case("truncated CIFAR-10 batch")
def _(place):
    argv = place.cifar10()
    return "cls_train", argv, place.cut(place.file("data_batch_3"))


@case("CIFAR-10 batch with code in it")
def _(place):
    argv = place.cifar10()
    path = place.file("test_batch")
    path.write_bytes(pickle.dumps({"data": Opens(place.folder / TRAP)}))
    return "cls_valid", argv, str(path)


@case("missing ImageNet (--dataDir)")
def _(place):
    argv = place.digits("DATASET.DATASET", "imagenet", "DATASET.ROOT", "data/imagenet")
    missing = place.folder / "nowhere"
    return "cls_train", [*argv, "--dataDir", str(missing)], f"{missing}/data/imagenet"


@case("ImageNet class without images")
def _(place):
    argv = place.imagenet()
    for path in place.file("*_0.JPEG").parent.iterdir():
        path.unlink()
    return "cls_train", argv, "images/train"


@case("class folders differ")
def _(place):
    argv = place.imagenet()
    shutil.rmtree(place.file("ILSVRC*.JPEG").parent)
    return "cls_train", argv, "n01440764"


@case("missing list")
def _(place):
    argv = place.cityscapes()
    place.file("train.lst").unlink()
    return "seg_train", argv, f"{place.data}/list/cityscapes/train.lst"


@case("empty list")
def _(place):
    argv = place.cityscapes()
    place.file("val.lst").write_text("\n")
    return "seg_test", argv, f"{place.data}/list/cityscapes/val.lst is empty"


@case("file of a list missing")
def _(place):
    argv = place.cityscapes()
    names = place.file("train.lst").read_text().splitlines()[2].split()
    missing = place.data / "cityscapes" / names[1]
    missing.unlink()
    return "seg_train", argv, f"train.lst, line 3: {missing} does not exist"


@case("training list without labels")
def _(place):
    argv = place.cityscapes("DATASET.TRAIN_SET", "list/cityscapes/test.lst")
    return "seg_train", argv, f"{place.data}/list/cityscapes/test.lst names no labels"


@case("validation list without labels")
def _(place):
    argv = place.cityscapes("DATASET.TEST_SET", "list/cityscapes/test.lst")
    return "seg_train", argv, "DATASET.TEST_SET list/cityscapes/test.lst"


@case("list with and without labels")
def _(place):
    argv = place.cityscapes()
    lines = place.file("val.lst").read_text().splitlines()
    place.file("val.lst").write_text(f"{lines[0]}\n{lines[1].split()[0]}\n")
    return "seg_test", argv, "val.lst, line 2"


@case("training set smaller than a batch")
def _(place):
    return "seg_train", place.cityscapes("TRAIN.BATCH_SIZE_PER_GPU", "5"), "4 samples, fewer than"


@case("two test images of one name")
def _(place):
    argv = place.cityscapes()
    line = place.file("val.lst").read_text().splitlines()[0]
    place.file("val.lst").write_text(f"{line}\n{line}\n")
    return "seg_test", argv, "frankfurt_000000_000019_leftImg8bit"


def damaged_labels(edit, name):
    """Training on labels of which one file was changed; ``name`` what its error names besides."""

    def prepare(place):
        argv = place.cityscapes()
        path = place.file("*labelIds.png")
        Image.fromarray(edit(np.array(Image.open(path)))).save(path)
        return "seg_train", argv, name, str(path)

    return prepare


def with_id(label_id):
    def edit(labels):
        labels[5, 7] = label_id
        return labels

    return edit


case("image and labels of different sizes", late=True)(
    damaged_labels(lambda labels: labels[:, :60], "60x32")
)
case("label id outside the map", late=True)(damaged_labels(with_id(34), "label id 34"))
case("coloured labels", late=True)(
    damaged_labels(lambda labels: np.stack([labels] * 3, axis=2), "one integer per pixel")
)


@case("validation label outside the map", late=True)
def _(place):
    argv = place.cityscapes("WORKERS", "1")
    path = sorted((place.data / "cityscapes/gtFine/val").rglob("*.png"))[1]
    Image.fromarray(with_id(200)(np.array(Image.open(path)))).save(path)
    return "seg_train", argv, "label id 200", str(path)


def corrupt(name, builder, pattern, workers):
    def prepare(place):
        argv = getattr(place, builder)("WORKERS", workers)
        return name, argv, place.cut(place.file(pattern))

    return prepare


for _workers in ("0", "1"):
    _more = f" (WORKERS {_workers})"
    case(f"corrupt JPEG{_more}", late=True)(corrupt("cls_train", "imagenet", "*_1.JPEG", _workers))
    case(f"truncated PNG{_more}", late=True)(
        corrupt("seg_train", "cityscapes", "aachen*_leftImg8bit.png", _workers)
    )
    case(f"truncated label PNG{_more}", late=True)(
        corrupt("seg_train", "cityscapes", "bochum*labelIds.png", _workers)
    )


@case("corrupt JPEG in validation", late=True)
def _(place):
    argv = place.imagenet("WORKERS", "1")
    return "cls_train", argv, place.cut(place.file("ILSVRC*.JPEG"))


@case("a file that is no image (cls_valid)")
def _(place):
    argv = place.imagenet("WORKERS", "1")
    assert run_tool("cls_train", *argv, "TRAIN.END_EPOCH", "1") == 0
    path = place.file("ILSVRC*.JPEG")
    path.write_text("<html>not found</html>")
    return "cls_valid", argv, str(path)


@case("test images of different sizes in a batch")
def _(place):
    def edit(state):  # to nineteen classes
        for name in ("weight", "bias"):
            state[f"last_layer.3.{name}"] = state[f"last_layer.3.{name}"][[0] * 19]

    argv = place.cityscapes("TEST.MODEL_FILE", place.weights(edit, "digit_scenes"), "WORKERS", "1")
    for path in (place.data / "cityscapes").rglob("frankfurt_000001*.png"):
        Image.open(path).crop((0, 0, 60, 32)).save(path)
    return "seg_test", argv, "60x32, 64x32", "batch size to 1"


# -- runs and files of weights


@case("existing run without TRAIN.RESUME")
def _(place):
    return "cls_train", place.digits(), str(place.run("digits")), "TRAIN.RESUME True"


@case("existing run without TRAIN.RESUME (segmentation)")
def _(place):
    return "seg_train", place.scenes(), str(place.run("digit_scenes")), "TRAIN.RESUME True"


RESUME = ["TRAIN.RESUME", "True"]


@case("resume with another batch size")
def _(place):
    place.run("digits")
    argv = place.digits(*RESUME, "TRAIN.BATCH_SIZE_PER_GPU", "2")
    return "cls_train", argv, "effective batch size of 4"


@case("resume with another share of the batches")
def _(place):
    place.run("digit_scenes")
    return "seg_train", place.scenes(*RESUME, "PERCENT", "0.5"), "batches per epoch of 3"


@case("resume with another optimiser")
def _(place):
    place.run("digits")
    return "cls_train", place.digits(*RESUME, "TRAIN.OPTIMIZER", "sgd"), "TRAIN.OPTIMIZER adam"


@case("resume with another model")
def _(place):
    place.run("digits")
    argv = place.digits(*RESUME, f"{STAGE}.NUM_CHANNELS", "[8,16]")
    return "cls_train", argv, "do not fit this model"


@case("resume from a truncated checkpoint")
def _(place):
    path = place.cut(place.run("digits") / CHECKPOINT)
    return "cls_train", place.digits(*RESUME), path


@case("resume from weights")
def _(place):
    run = place.run("digit_scenes")
    shutil.copy(run / WEIGHTS, run / CHECKPOINT)
    return "seg_train", place.scenes(*RESUME), str(run / CHECKPOINT), "not a checkpoint"


@case("resume from a checkpoint that lacks an entry")
def _(place):
    path = place.run("digits") / CHECKPOINT
    state = load(path)
    del state["window"]
    torch.save(state, path)
    return "cls_train", place.digits(*RESUME), str(path), "window"


@case("resume from a checkpoint with NaN weights")
def _(place):
    path = place.run("digits") / CHECKPOINT
    state = load(path)
    state["state_dict"]["classifier.bias"][0] = math.nan
    torch.save(state, path)
    return "cls_train", place.digits(*RESUME), str(path), "classifier.bias"


@case("resume from a checkpoint with code in it")
def _(place):
    path = place.run("digits") / CHECKPOINT
    torch.save(load(path) | {"x": Opens(place.folder / TRAP)}, path)
    return "cls_train", place.digits(*RESUME), str(path)


@case("resume with damaged settings")
def _(place):
    path = place.run("digits") / CONFIG
    path.write_text("MODEL: [")
    return "cls_train", place.digits(*RESUME), str(path)


@case("missing TRAIN.CHECKPOINT")
def _(place):
    return "seg_train", place.scenes("TRAIN.CHECKPOINT", "no/checkpoint.pt"), "no/checkpoint.pt"


@case("missing TRAIN.MODEL_FILE")
def _(place):
    return "cls_train", place.digits("TRAIN.MODEL_FILE", "no/model.pt"), "no/model.pt"


@case("no run to evaluate")
def _(place):
    return "cls_valid", place.digits(), f"digits/cls_mdeq_TINY/{WEIGHTS}"


@case("missing TEST.MODEL_FILE (--testModel)")
def _(place):
    return "seg_test", [*place.scenes(), "--testModel", "no/model.pt"], "no/model.pt"


@case("truncated TEST.MODEL_FILE")
def _(place):
    path = place.cut(Path(place.weights(lambda state: None)))
    return "cls_valid", place.digits("TEST.MODEL_FILE", path), path


@case("TEST.MODEL_FILE of another model")
def _(place):
    path = place.weights(lambda state: None)
    return "seg_test", place.scenes("TEST.MODEL_FILE", path), path, "missing last_layer.0.weight"


@case("TEST.MODEL_FILE of another shape")
def _(place):
    def edit(state):
        state["classifier.bias"] = torch.zeros(3)

    argv = place.digits("TEST.MODEL_FILE", place.weights(edit))
    return "cls_valid", argv, "classifier.bias has shape (3,) instead of (10,)"


@case("TEST.MODEL_FILE with NaN")
def _(place):
    def edit(state):
        state["last_layer.3.bias"][1] = math.nan

    argv = place.scenes("TEST.MODEL_FILE", place.weights(edit, "digit_scenes"))
    return "seg_test", argv, "not finite: last_layer.3.bias"


@case("TEST.MODEL_FILE with code in it")
def _(place):
    def edit(state):
        state["x"] = Opens(place.folder / TRAP)

    path = place.weights(edit)
    return "cls_valid", place.digits("TEST.MODEL_FILE", path), path


@case("missing MODEL.PRETRAINED")
def _(place):
    return "seg_train", place.scenes("MODEL.PRETRAINED", "no/mdeq.pth"), "no/mdeq.pth"


@case("MODEL.PRETRAINED that matches nothing")
def _(place):
    path = place.weights(lambda state: None)
    argv = place.scenes("MODEL.PRETRAINED", path, f"{STAGE}.NUM_CHANNELS", "[12,12]")
    return (
        "seg_train",
        argv,
        f"no weight of f in {path} fits",
        "(36, 1, 1, 1), and finds (24, 1, 1, 1)",
    )


@case("MODEL.PRETRAINED with NaN")
def _(place):
    def edit(state):
        state["fullstage.branches.0.blocks.0.conv1.weight_g"][0] = math.nan

    argv = place.scenes("MODEL.PRETRAINED", place.weights(edit))
    return "seg_train", argv, "not finite: fullstage.branches.0.blocks.0.conv1.weight_g"


@case("output folder that cannot be made")
def _(place):
    (place.folder / "file").write_text("")
    argv = [*place.digits(), "--modelDir", str(place.folder / "file" / "runs")]
    return "cls_train", argv, str(place.folder / "file")


@case(
    "log folder that cannot be made",
    xfail="Run makes the events folder last: the run is half written",
)
def _(place):
    (place.folder / "file").write_text("")
    return (
        "cls_train",
        [*place.digits(), "--logDir", f"{place.folder}/file"],
        f"{place.folder}/file",
    )


@case("classification in several processes")
def _(place):
    place.monkeypatch.setattr(Processes, "start", lambda: Processes(0, 2, 0))
    place.monkeypatch.setattr(Processes, "stop", lambda self: None)
    return "cls_train", place.digits(), "without torchrun"


@case(
    "several processes that nothing has started",
    xfail="Processes.start: ValueError of torch (RANK)",
)
def _(place):
    place.monkeypatch.setenv("WORLD_SIZE", "2")
    return "seg_train", place.scenes(), "torchrun"


# -- extractor and lists


@case("extractor: missing file")
def _(place):
    return "extract", ["no/model.pt", str(place.folder / "out.pth")], "no/model.pt"


@case("extractor: no output named")
def _(place):
    return "extract", [place.weights(lambda state: None)], "output"


@case("extractor: a file without a backbone")
def _(place):
    path = place.folder / "resnet.pth"
    torch.save({"layer1.weight": torch.zeros(2)}, path)
    return "extract", [str(path), str(place.folder / "new/out.pth")], str(path), "no MDEQ model"


@case("extractor: NaN weights")
def _(place):
    def edit(state):
        state["downsample.0.weight"][0] = math.nan

    argv = [place.weights(edit), str(place.folder / "new/out.pth")]
    return "extract", argv, "not finite: downsample.0.weight"


@case("extractor: folder that cannot be made")
def _(place):
    (place.folder / "file").write_text("")
    argv = [place.weights(lambda state: None), str(place.folder / "file/out.pth")]
    return "extract", argv, str(place.folder / "file")


@case("lists: no such folder")
def _(place):
    return "make_cityscapes_lists", [str(place.data)], str(place.data / "cityscapes")


@case("lists: labels missing")
def _(place):
    place.cityscapes()
    shutil.rmtree(place.data / "list")
    path = place.file("frankfurt*labelIds.png")
    path.unlink()
    return "make_cityscapes_lists", [str(place.data)], str(path)


# ---- the test -----------------------------------------------------------------------------------


def contents(folder):
    """Every file with its bytes, and every folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(("title", "prepare", "late"), CASES.values())
def test_bad_input(place, capfd, monkeypatch, recwarn, record_property, title, prepare, late):
    monkeypatch.chdir(place.folder)
    name, argv, *named = prepare(place)
    before = contents(place.folder)
    capfd.readouterr()
    recwarn.clear()
    code = tool(name, argv)
    captured = capfd.readouterr()  # of the descriptors: workers print there
    record_property("row", (title, code, captured.err.strip().replace(str(place.folder), "...")))
    assert code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{PROGRAMS.get(name, f'{name}.py')}: ")
    assert [part for part in named if part not in line] == []
    assert "Traceback" not in captured.out
    warned = [w for w in recwarn if not (late and "DEQWarning" in w.category.__name__)]
    assert [str(w.message) for w in warned] == []  # lines too, outside of pytest
    after = contents(place.folder)
    new = after.keys() - before.keys()
    if late:  # a run has begun, but there is nothing to continue or to evaluate
        files = {Path(path).name for path in new if after[path] is not None}
        assert {f for f in files if not f.startswith("events.")} <= {LOG, METRICS, CONFIG, WEIGHTS}
    else:
        assert captured.out == ""
        assert new == set()
    assert {path: after[path] for path in before} == before
    assert not (place.folder / TRAP).exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_refused_for_its_data_can_begin_again(place, workers):
    """Without TRAIN.RESUME: it has no checkpoint."""
    argv = place.imagenet("WORKERS", str(workers), "TRAIN.END_EPOCH", "1")
    path = place.file("*_1.JPEG")
    content = path.read_bytes()
    place.cut(path)
    assert run_tool("cls_train", *argv) == 2
    path.write_bytes(content)
    assert run_tool("cls_train", *argv) == 0


@pytest.mark.parametrize(
    "program", ["seg_train", pytest.param("extract_pretrained", marks=pytest.mark.slow)]
)
def test_in_a_process_of_its_own(tmp_path, program):
    """Nothing else on the error stream, not even from the imports."""
    command = [sys.executable, str(ROOM / "tools" / f"{program}.py")]
    command += (
        ["--cfg", str(SCENES), "MODEL.PRETRAINED", "no.pth"]
        if program == "seg_train"
        else ["no.pth", "out.pth"]
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}.py: no file no.pth")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_traps_work(tmp_path):
    """Unpickled without care, they do create the file."""
    pickle.loads(pickle.dumps(Opens(tmp_path / TRAP))).close()
    assert (tmp_path / TRAP).exists()


# ---- what looks bad and is not ------------------------------------------------------------------


def converted(path: Path, mode: str, suffix: str | None = None) -> Path:
    image = Image.open(path).convert(mode)
    path.unlink()
    path = path.with_suffix(suffix or path.suffix)
    image.save(path)
    return path


def test_grey_palette_and_transparent_images_are_accepted(place):
    argv = place.imagenet("TRAIN.END_EPOCH", "1")
    for pattern in ("*_0.JPEG", "ILSVRC*0000.JPEG"):
        converted(place.file(pattern), "L")
        for mode in ("RGBA", "P", "CMYK"):
            path = place.file(pattern.replace("0.", "1."))
            other = path.with_stem(f"{path.stem}_{mode}")
            shutil.copy(path, other)
            converted(other, mode, ".jpeg" if mode == "CMYK" else ".png")
    assert run_tool("cls_train", *argv) == 0
    assert (
        "9 training and 9 validation images"
        in (place.output / "imagenet/cls_mdeq_TINY" / LOG).read_text()
    )


def test_grey_and_transparent_scenes_are_accepted(place):
    argv = place.cityscapes("TRAIN.END_EPOCH", "1")
    images = sorted((place.data / "cityscapes/leftImg8bit").rglob("*.png"))
    for i, path in enumerate(images):
        converted(path, ("L", "RGBA", "LA", "P")[i % 4])
    for path in (place.data / "cityscapes/gtFine").rglob("*.png"):
        labels = np.array(Image.open(path))
        image = Image.fromarray(labels, "P")  # ids with colours to look at
        image.putpalette(noise(np.random.default_rng(0), 16, 16).tobytes())
        image.save(path)
    assert run_tool("seg_train", *argv) == 0
    assert run_tool("seg_test", *argv) == 0


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("which", ["all", "one"])
def test_all_ignored_batches_train_on(place, ohem, which):
    """Labels of licence plates (255) alone: no loss, and no NaN."""
    argv = place.cityscapes("LOSS.USE_OHEM", str(ohem), "LOSS.OHEMKEEP", "10", "TRAIN.WD", "0")
    labels = sorted((place.data / "cityscapes/gtFine/train").rglob("*.png"))
    for path in labels if which == "all" else labels[:3]:
        Image.fromarray(np.full((32, 64), 255, np.uint8)).save(path)
    assert run_tool("seg_train", *argv) == 0
    run = place.output / "cityscapes/seg_mdeq_TINY"
    records = [r for r in read_metrics(run) if r["kind"] == "train"]
    assert len(records) == 4
    losses = [r["loss"] for r in records]
    if which == "all":
        assert losses == [0.0] * 4
    else:
        assert 0 in losses
        assert all(math.isfinite(loss) for loss in losses)
        assert max(losses) > 1
    assert all(t.isfinite().all() for t in load(run / WEIGHTS).values() if t.is_floating_point())


def test_a_validation_set_without_a_labelled_pixel(place):
    """Figures are nan, and the run goes on to its end."""
    argv = place.cityscapes("TRAIN.END_EPOCH", "2")
    for path in (place.data / "cityscapes/gtFine/val").rglob("*.png"):
        Image.fromarray(np.zeros((32, 64), np.uint8)).save(path)  # "unlabeled"
    assert run_tool("seg_train", *argv) == 0
    run = place.output / "cityscapes/seg_mdeq_TINY"
    assert [math.isnan(r["mIoU"]) for r in read_metrics(run) if r["kind"] == "valid"] == [True] * 2
    assert run_tool("seg_test", *argv) == 0


def test_lists_written_again_are_the_same(place):
    place.cityscapes()
    before = contents(place.data)
    write_lists(place.data)
    assert contents(place.data) == before


class _Table:
    """A pytest plugin that prints each case as it was answered."""

    def pytest_runtest_logreport(self, report):
        for _, (title, code, message) in report.user_properties if report.when == "call" else ():
            print(f"{title} | {code} | {message.replace(os.linesep, ' // ')}", file=sys.__stdout__)


if __name__ == "__main__":
    print("case | exit code | message")
    sys.exit(pytest.main([__file__, "-p", "no:terminal"], plugins=[_Table()]))
