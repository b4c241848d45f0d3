"""Bad input to the image tools: one line that names the thing, exit code 2, nothing written."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import refusals
from refusals import STAGE, TRAP, Opens, cases, check
from small_runs import DIGITS, ROOM, run_tool

finished, place, quick = refusals.finished, refusals.place, refusals.quick  # fixtures
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
CASES, case = cases()

# -- command line and settings


@case("no --cfg")
def _(place):
    return "cls_train", [], "--cfg"


@case("missing --cfg file")
def _(place):
    return "seg_test", ["--cfg", "experiments/nothing.yaml"], "experiments/nothing.yaml"


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


@case("unknown flag")
def _(place):
    return "seg_train", place.scenes("--modeldir", "x"), "did you mean --modelDir?"


@case("unknown flag (extractor)")
def _(place):
    return "extract", ["--ckpt", "a", "b"], "--ckpt"


@case("unknown flag (lists)")
def _(place):
    return "make_cityscapes_lists", ["--dataDir", "data"], "--dataDir"


@case("--percent 0")
def _(place):
    return "cls_train", [*place.digits(), "--percent", "0"], "--percent"


@case("--percent that is no number")
def _(place):
    return "cls_train", [*place.digits(), "--percent", "half"], "--percent"


@case("negative weight decay")
def _(place):
    return "cls_train", place.digits("TRAIN.WD", "-0.1"), "TRAIN.WD"


@case("NESTEROV without momentum")
def _(place):
    more = ["TRAIN.OPTIMIZER", "sgd", "TRAIN.NESTEROV", "True", "TRAIN.MOMENTUM", "0"]
    return "cls_train", place.digits(*more), "TRAIN.NESTEROV"


@case("OHEM threshold out of range")
def _(place):
    return "seg_train", place.scenes("LOSS.OHEMTHRES", "2"), "OHEMTHRES"


# -- model


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


@case("channels that are no numbers")
def _(place):
    more = [f"{STAGE}.NUM_CHANNELS", "[8,'many']"]
    return "cls_train", place.digits(*more), f"{STAGE}.NUM_CHANNELS"


# -- data


@case("data set of the other task")
def _(place):
    return "seg_train", place.scenes("DATASET.DATASET", "cifar10"), "no segmentation data set"


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


@case("validation list without labels")
def _(place):
    argv = place.cityscapes("DATASET.TEST_SET", "list/cityscapes/test.lst")
    return "seg_train", argv, "DATASET.TEST_SET list/cityscapes/test.lst"


@case("training set smaller than a batch")
def _(place):
    return "seg_train", place.cityscapes("TRAIN.BATCH_SIZE_PER_GPU", "5"), "4 samples, fewer than"


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
    return "seg_test", argv, "TEST.BATCH_SIZE_PER_GPU is ", "60x32, 64x32", "set it to 1"


# ---- the test


@pytest.mark.parametrize("case", CASES.values())
def test_bad_input(place, capfd, recwarn, case):
    check(place, capfd, recwarn, case)


@pytest.mark.parametrize(
    "program", ["cls_train", pytest.param("extract_pretrained", marks=pytest.mark.slow)]
)
def test_in_a_process_of_its_own(tmp_path, program):
    """Nothing else on the error stream, not even from the imports."""
    command = [sys.executable, str(ROOM / "tools" / f"{program}.py")]
    command += (
        ["--cfg", str(DIGITS), "MODEL.PRETRAINED", "no.pth"]
        if program == "cls_train"
        else ["no.pth", "out.pth"]
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}.py: ")
    assert "no file no.pth" in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_traps_work(tmp_path):
    """Unpickled without care, they do create the file."""
    pickle.loads(pickle.dumps(Opens(tmp_path / TRAP))).close()
    assert (tmp_path / TRAP).exists()
