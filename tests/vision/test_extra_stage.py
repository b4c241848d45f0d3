"""A second stage of segmentation's training, on another list: its data, its rates, its border."""

import pytest
import torch

from harness import assert_same_run, differences, records
from image_files import write_cityscapes
from lib.runs.checkpoint import load
from lib.runs.interrupts import Stopping
from lib.runs.run_folder import CHECKPOINT, LOG
from mdeq_vision import command, image_trainer
from mdeq_vision.config import config
from mdeq_vision.curriculum import Curriculum
from mdeq_vision.datasets import digit_scenes
from mdeq_vision.schedules import learning_rate
from small_digits import of_kind
from small_runs import SCENES, TINY, run_tool
from test_resume_vision import NARROW

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
RATE, EXTRA_RATE = 0.02, 0.005
# Two epochs of two batches, then two of three.
FIRST, EXTRA, LAST = 4, 6, 10
MORE = f"""
    DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 DATASET.TRAIN_SET list/cityscapes/train.lst
    DATASET.TEST_SET list/cityscapes/val.lst TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 64
    TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64 TRAIN.BATCH_SIZE_PER_GPU 2 TEST.BATCH_SIZE_PER_GPU 2
    TRAIN.PRETRAIN_STEPS 3 SAVE_FREQ 1 TRAIN.LR {RATE} TRAIN.LR_SCHEDULER poly TRAIN.OPTIMIZER sgd
""".split()
STAGE = f"""
    DATASET.EXTRA_TRAIN_SET list/cityscapes/trainval.lst TRAIN.EXTRA_EPOCH 2
    TRAIN.EXTRA_LR {EXTRA_RATE}
""".split()
EXTRA_LIST = "list/cityscapes/trainval.lst"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes most of the time of such a short run, and is tested elsewhere, is left out."""
    monkeypatch.setattr(command, "model_summary", lambda *arguments: "")
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 4, "test": 4, "valid": 4})


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Five images to train on, seven in the extra list: one is left over in either."""
    return write_cityscapes(tmp_path_factory.mktemp("city"), n_train=5, n_val=2, size=(64, 32))


@pytest.fixture
def argv(city, tmp_path):
    def make(*more, to="run"):
        places = ["--cfg", SCENES, "--modelDir", tmp_path / to, *TINY, *NARROW, *MORE]
        return [*places, "DATASET.ROOT", city, *more]

    return make


@pytest.fixture
def folder(tmp_path):
    return lambda to="run": tmp_path / to / "cityscapes" / SCENES.stem


@pytest.fixture(scope="module")
def whole(city, tmp_path_factory):
    """An uninterrupted run over both stages, and the files that each of its epochs loaded."""
    loaded = []
    original = image_trainer.make_loader

    def make_loader(dataset, *, epoch, **options):
        loaded.append((epoch, len(dataset), options["start"]))
        return original(dataset, epoch=epoch, **options)

    folder = tmp_path_factory.mktemp("whole")
    argv = ["--cfg", SCENES, "--modelDir", folder, *TINY, *NARROW, *MORE, *STAGE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_trainer, "make_loader", make_loader)
        patch.setattr(command, "model_summary", lambda *arguments: "")
        assert run_tool("seg_train", *argv, "DATASET.ROOT", city) == 0
    return folder / "cityscapes" / SCENES.stem, loaded


def test_both_stages(whole):
    """Each epoch loads from its own list, in its own number of steps, at its own rate."""
    folder, loaded = whole
    assert loaded == [(0, 5, 0), (1, 5, 0), (2, 7, 0), (3, 7, 0)]
    steps = of_kind(folder, "train")
    assert [r["step"] for r in steps] == list(range(1, LAST + 1))
    first = [RATE * (1 - n / FIRST) ** 0.9 for n in range(FIRST)]
    extra = [EXTRA_RATE * (1 - n / EXTRA) ** 0.9 for n in range(EXTRA)]
    assert [r["lr"] for r in steps] == pytest.approx([*first, *extra], rel=1e-12)
    # After each epoch, and where the equilibrium begins.
    assert [r["step"] for r in of_kind(folder, "valid")] == [2, 3, 4, 7, 10]
    assert load(folder / CHECKPOINT)["step"] == LAST
    log = (folder / LOG).read_text()
    assert "5 training and 2 validation images" in log
    assert "after epoch 2: 2 epochs over 7 images of list/cityscapes/trainval.lst" in log
    assert "step 4 | the extra stage begins at epoch 2" in log
    assert "epoch 3 [3/3] | step 10" in log


@pytest.mark.parametrize("stop", [4, 5, 9])
def test_stopped_and_resumed(argv, folder, whole, stop_at, stop):
    """In the last step of the first stage, the first of the extra one, and within it."""
    stop_at(stop)
    assert run_tool("seg_train", *argv(*STAGE)) == 130
    assert load(folder() / CHECKPOINT)["step"] == stop - 1
    assert run_tool("seg_train", *argv(*STAGE, "TRAIN.RESUME", "True")) == 0
    assert_same_run(folder(), whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valid", "train"])
@pytest.mark.parametrize("stop", range(2, LAST + 1))
def test_stopped_anywhere(argv, folder, whole, stop_at, stop, kind):
    stop_at(stop, kind)
    more = [*STAGE, "WORKERS", "1"]
    code = run_tool("seg_train", *argv(*more))
    if code == 0:
        assert kind == "valid"  # none is due after this step
        return
    assert run_tool("seg_train", *argv(*more, "TRAIN.RESUME", "True")) == 0
    assert_same_run(folder(), whole[0])


@pytest.mark.parametrize("step", [FIRST, FIRST + 1])
def test_the_time_limit_at_the_border(argv, folder, whole, monkeypatch, step):
    """Stopped before the validation that ends the first stage, and one step later."""
    check, asked = Stopping.check, []

    def time_is_up(self):
        asked.append(self)
        self.time_is_up = len(asked) == step
        return check(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "check", time_is_up)
        assert run_tool("seg_train", *argv(*STAGE)) == 0
    saved = load(folder() / CHECKPOINT)
    assert (saved["step"], saved["unfinished"]) == (step, step == FIRST)
    assert run_tool("seg_train", *argv(*STAGE, "TRAIN.RESUME", "True")) == 0
    kept = [r for r in records(folder()) if r["kind"] != "summary"]  # a stopped part has its own
    assert kept == [r for r in records(whole[0]) if r["kind"] != "summary"]
    assert list(differences(load(folder() / CHECKPOINT), load(whole[0] / CHECKPOINT))) == []


def test_a_finished_run_may_be_given_an_extra_stage(argv, folder, whole, capsys):
    """The first stage knows nothing of the second."""
    assert run_tool("seg_train", *argv()) == 0
    capsys.readouterr()
    assert run_tool("seg_train", *argv(*STAGE, "TRAIN.RESUME", "True")) == 0
    out = capsys.readouterr().out
    assert f"changed since the checkpoint: DATASET.EXTRA_TRAIN_SET from '' to '{EXTRA_LIST}'" in out
    kept = [r for r in records(folder()) if r["kind"] != "summary"]
    assert kept == [r for r in records(whole[0]) if r["kind"] != "summary"]
    assert list(differences(load(folder() / CHECKPOINT), load(whole[0] / CHECKPOINT))) == []


@pytest.mark.parametrize(
    "more",
    [
        ["TRAIN.END_EPOCH", "4"],  # the run's place would be in the first stage
        ["DATASET.EXTRA_TRAIN_SET", "list/cityscapes/val.lst"],  # in another epoch's middle
        ["DATASET.EXTRA_TRAIN_SET", "", "TRAIN.EXTRA_EPOCH", "0"],
    ],
)
def test_a_place_in_other_stages_is_refused(argv, folder, stop_at, capsys, more):
    stop_at(FIRST + 2)
    assert run_tool("seg_train", *argv(*STAGE)) == 130
    before = (folder() / CHECKPOINT).read_bytes()
    capsys.readouterr()
    assert run_tool("seg_train", *argv(*STAGE, "TRAIN.RESUME", "True", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "saved at step 5, after 1 of 3 batches of epoch 2" in line
    assert (folder() / CHECKPOINT).read_bytes() == before


def test_begun_in_the_extra_stage(argv, folder, whole):
    """BEGIN_EPOCH counts the epochs of both."""
    assert run_tool("seg_train", *argv(*STAGE, "TRAIN.BEGIN_EPOCH", "3")) == 0
    steps = of_kind(folder(), "train")
    assert [r["step"] for r in steps] == [8, 9, 10]
    assert [r["lr"] for r in steps] == [r["lr"] for r in of_kind(whole[0], "train")][-3:]


@pytest.mark.parametrize("kind", ["cosine", "poly", "step"])
def test_rates_begin_again(kind):
    """The extra stage has the rates of a run of its own."""
    cfg = config.clone()
    cfg.TRAIN.LR_SCHEDULER, cfg.TRAIN.LR_STEP = kind, [1, 2]
    cfg.TRAIN.LR, cfg.TRAIN.END_EPOCH = RATE, 4
    cfg.TRAIN.EXTRA_LR, cfg.TRAIN.EXTRA_EPOCH = EXTRA_RATE, 3
    found = [learning_rate(cfg, n, 5, 7) for n in range(20 + 21)]
    cfg.TRAIN.EXTRA_EPOCH = 0
    first = [learning_rate(cfg, n, 5) for n in range(20)]
    cfg.TRAIN.LR, cfg.TRAIN.END_EPOCH = EXTRA_RATE, 3
    assert found == [*first, *(learning_rate(cfg, n, 7) for n in range(21))]


def test_steps_before_an_epoch():
    cfg = config.clone()
    cfg.TRAIN.END_EPOCH, cfg.TRAIN.EXTRA_EPOCH = 2, 2
    sizes = torch.zeros(9), torch.zeros(14)
    one = Curriculum(cfg, sizes[0], None, batch_size=2, drop_last=True)
    two = Curriculum(cfg, *sizes, batch_size=2, drop_last=True)
    assert [one.steps_before(epoch) for epoch in range(5)] == [0, 4, 8, 12, 16]
    assert [two.steps_before(epoch) for epoch in range(5)] == [0, 4, 8, 15, 22]
    assert [two.at(epoch).n_batches for epoch in range(5)] == [4, 4, 7, 7, 7]


@pytest.mark.parametrize(
    ("tool", "more", "named"),
    [
        ("seg_train", ["TRAIN.EXTRA_EPOCH", "2"], "TRAIN.EXTRA_EPOCH 2 needs a list"),
        ("seg_train", ["DATASET.EXTRA_TRAIN_SET", EXTRA_LIST], "while TRAIN.EXTRA_EPOCH is 0"),
        ("seg_train", [*STAGE, "TRAIN.EXTRA_EPOCH", "-1"], "TRAIN.EXTRA_EPOCH is -1"),
        ("seg_train", [*STAGE, "TRAIN.EXTRA_LR", "0"], "TRAIN.EXTRA_LR is 0.0"),
        ("seg_train", [*STAGE, "DATASET.EXTRA_TRAIN_SET", "no.lst"], "no.lst cannot be read"),
        (
            "seg_train",
            [*STAGE, "DATASET.EXTRA_TRAIN_SET", "list/cityscapes/test.lst"],
            "test.lst names no labels",
        ),
        (
            "seg_train",
            [*STAGE, *"DATASET.EXTRA_TRAIN_SET list/cityscapes/val.lst TRAIN.BATCH_SIZE 3".split()],
            "DATASET.EXTRA_TRAIN_SET: the data set has 2 samples",
        ),
        ("seg_train", [*STAGE, "DATASET.DATASET", "digit_scenes"], "digit_scenes has no lists"),
    ],
)
def test_bad_settings(argv, folder, capsys, tool, more, named):
    if "digit_scenes" in more:
        more = [*more, "DATASET.NUM_CLASSES", "11"]
    assert run_tool(tool, *argv(*more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not folder().exists()
