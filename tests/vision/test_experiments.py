"""Every published setting trains and validates on small files in the true formats.

Sizes are overridden, the rest is as in the yaml files; PRETRAIN_STEPS 1 makes step 2 an
equilibrium step. The slow half has the published number of channels.
"""

import math
from pathlib import Path

import pytest

from image_files import write_cifar10, write_cityscapes, write_imagenet
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, read_metrics
from mdeq_vision import command
from mdeq_vision.command import CONFIG
from mdeq_vision.config import config, merge_file
from small_runs import EXPERIMENTS, ROOM, run_tool

SMALL = {
    "cifar": """
        TRAIN.BATCH_SIZE_PER_GPU 4 TEST.BATCH_SIZE_PER_GPU 5 PERCENT 0.12
    """,
    "imagenet": """
        MODEL.IMAGE_SIZE [32,32] TRAIN.BATCH_SIZE_PER_GPU 4 TEST.BATCH_SIZE_PER_GPU 5
    """,
    "cityscapes": """
        TRAIN.IMAGE_SIZE [64,32] TRAIN.BASE_SIZE 64 TRAIN.BATCH_SIZE_PER_GPU 2
        TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64 MODEL.PRETRAINED ""
    """,
}
COMMON = """
    TRAIN.PRETRAIN_STEPS 1 TRAIN.END_EPOCH 1 PRINT_FREQ 1 WORKERS 0
    DEQ.F_THRES 3 DEQ.B_THRES 3 MODEL.NUM_LAYERS 2 TEST.NUM_SAMPLES 5
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three data sets, below one DATA_DIR."""
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root / "data/cifar10", per_batch=20)
    write_imagenet(root / "data/imagenet", classes=3, per_class=4)
    write_cityscapes(root / "data", n_train=6, n_val=2, size=(64, 32))
    return root


@pytest.mark.parametrize(
    "narrow", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["narrow", "full width"]
)
@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")  # three iterations do not converge
def test_three_steps_and_a_validation(name, narrow, data, tmp_path, monkeypatch):
    kind = Path(name).parent.name
    tool = "seg_train" if kind == "cityscapes" else "cls_train"
    overrides = [*SMALL[kind].split(), *COMMON.split(), "LOG_DIR", str(tmp_path / "log")]
    file = ROOM / "experiments" / name
    if narrow:
        monkeypatch.setattr(command, "model_summary", lambda *arguments: "")
        branches = config_of(file).MODEL.EXTRA.FULL_STAGE.NUM_BRANCHES
        stage = "MODEL.EXTRA.FULL_STAGE"
        overrides += [f"{stage}.NUM_CHANNELS", str([8, 16, 32, 64][:branches])]
        if tool == "cls_train":
            overrides += [f"{stage}.HEAD_CHANNELS", str([8] * branches)]
    places = ["--dataDir", str(data), "--modelDir", str(tmp_path)]
    assert run_tool(tool, "--cfg", str(file), *places, *overrides) == 0

    folder = tmp_path / config_of(file).DATASET.DATASET / file.stem
    records = read_metrics(folder)
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3]
    assert all(math.isfinite(r["loss"]) for r in train)
    assert ["backward_nfe" in r for r in train] == [False, True, True]
    valid = [r for r in records if r["kind"] == "valid"]
    assert [(r["step"], r["phase"]) for r in valid] == [(1, "stacked"), (3, "equilibrium")]
    assert load(folder / CHECKPOINT)["step"] == 3
    assert (folder / WEIGHTS).is_file()
    resolved = config_of(folder / CONFIG)
    assert resolved.TRAIN.PRETRAIN_STEPS == 1
    assert narrow or resolved.MODEL.EXTRA == config_of(file).MODEL.EXTRA
    assert list((tmp_path / "log" / folder.relative_to(tmp_path)).glob("events.*"))


def config_of(file):
    cfg = config.clone()
    merge_file(cfg, file)
    return cfg
