"""Bad runs and files of weights, given to the image tools."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import refusals
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, WEIGHTS
from mdeq_vision.command import CONFIG
from refusals import STAGE, TRAP, Opens, cases, check

finished, place, quick = refusals.finished, refusals.place, refusals.quick  # fixtures
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
CASES, case = cases()

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
)
def _(place):
    (place.folder / "file").write_text("")
    return (
        "cls_train",
        [*place.digits(), "--logDir", f"{place.folder}/file"],
        f"{place.folder}/file",
    )


@case(
    "several processes that nothing has started",
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


# ---- the test


@pytest.mark.parametrize("case", CASES.values())
def test_bad_input(place, capfd, recwarn, case):
    check(place, capfd, recwarn, case)
