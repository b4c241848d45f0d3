"""A run that was killed and resumed is, bit for bit, the one that was not."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch

from harness import assert_same_run, differences, records
from image_files import write_cityscapes, write_imagenet
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, METRICS, WEIGHTS, read_metrics
from mdeq_vision import command
from mdeq_vision.command import CONFIG
from mdeq_vision.config import config, merge_file
from mdeq_vision.datasets import digit_scenes
from mdeq_vision.datasets.digits import DigitImages
from parameters import slow_but
from small_runs import DIGITS, ROOM, SCENES, TINY, TINY_DIGITS, run_tool

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
STAGE = "MODEL.EXTRA.FULL_STAGE"
NARROW = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4]
    {STAGE}.NUM_BLOCKS [1,1] {STAGE}.BIG_KERNELS [0,0] TRAIN.PRETRAIN_STEPS 5
    DEQ.SPECTRAL_RADIUS_MODE False WORKERS 0 SAVE_FREQ 2 TEST.NUM_SAMPLES 4
""".split()
SCENES_ONLY = """
    PERCENT 0.4 TRAIN.FLIP True TRAIN.MULTI_SCALE True TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 32
""".split()
# Two epochs of four steps: saved after 2, 4 (an epoch), 5 (the border), 6 and 8.
KINDS = {
    "cls": ("cls_train", DIGITS, "digits", [*TINY_DIGITS, *NARROW, "PERCENT", "0.0137"]),
    "seg": ("seg_train", SCENES, "digit_scenes", [*TINY, *NARROW, *SCENES_ONLY]),
}
LAST = 8


class Settings:
    """A run of either kind, in a folder of its own or in another."""

    def __init__(self, kind, parent):
        self.tool, self.file, self.dataset, self.overrides = KINDS[kind]
        self.parent = parent

    def argv(self, *more, to="run"):
        places = ["--cfg", str(self.file), "--modelDir", str(self.parent / to)]
        return [*places, *self.overrides, *map(str, more)]

    def folder(self, to="run"):
        return self.parent / to / self.dataset / self.file.stem

    def train(self, *more, to="run"):
        return run_tool(self.tool, *self.argv(*more, to=to))

    def resume(self, *more):
        return self.train("TRAIN.RESUME", "True", *more)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes most of the time of such a short run, and is tested elsewhere, is left out."""
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})
    monkeypatch.setattr(command, "model_summary", lambda *arguments: "")


@pytest.fixture(params=slow_but(["cls"], KINDS))
def settings(request, tmp_path):
    """Of a classifier; a segmenter's run is kept by the same code, but for its items."""
    return Settings(request.param, tmp_path)


@pytest.fixture
def digits(tmp_path):
    return Settings("cls", tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of either kind with these settings, made once."""
    made = {}

    def get(settings, *more):
        key = (settings.tool, more)
        if key not in made:
            settings = Settings(settings.tool[:3], tmp_path_factory.mktemp("whole"))
            assert settings.train(*more) == 0
            made[key] = settings.folder()
        return made[key]

    return get


@pytest.fixture(scope="module")
def stopped_runs():
    """Folders of runs that stopped, by tool; for ``interrupted``."""
    return {}


@pytest.fixture
def interrupted(stopped_runs, tmp_path_factory, stop_at):
    """``interrupted(settings)`` puts a run there that stopped after step 7; it is trained once."""

    def put(settings):
        if settings.tool not in stopped_runs:
            own = Settings(settings.tool[:3], tmp_path_factory.mktemp("stopped"))
            stop_at(7)
            assert own.train() == 130
            stopped_runs[settings.tool] = own.folder()
        shutil.copytree(stopped_runs[settings.tool], settings.folder())

    return put


@pytest.fixture
def finished(whole):
    """``finished(settings, to)`` puts a run there that has come to its end."""

    def put(settings, to="run"):
        shutil.copytree(whole(settings, "WORKERS", 0), settings.folder(to))

    return put


# ---- stopped within the process, which is cheaper than a kill and as abrupt ---------------------


@pytest.mark.parametrize(
    ("kind", "stop", "workers"),
    slow_but([("cls", 3, 0), ("seg", 7, 0), ("cls", 7, 1)], product(KINDS, (3, 7), (0, 1))),
)
def test_stopped_and_resumed(tmp_path, whole, stop_at, kind, stop, workers):
    """In the middle of the first epoch (stacked), of the second (equilibrium)."""
    settings = Settings(kind, tmp_path)
    expected = whole(settings, "WORKERS", 0)
    stop_at(stop)
    assert settings.train("WORKERS", workers) == 130
    assert load(settings.folder() / CHECKPOINT)["step"] < stop
    assert settings.resume("WORKERS", workers) == 0
    assert_same_run(settings.folder(), expected)


@pytest.mark.slow
def test_stopped_in_every_step(settings, whole, stop_at):
    """Saved after every step, continued after each."""
    expected = whole(settings, "WORKERS", 0)
    resume = "False"
    for stop in range(2, LAST + 1):
        stop_at(stop)
        assert settings.train("TRAIN.RESUME", resume, "SAVE_FREQ", "1") == 130
        resume = "True"
    assert settings.resume("SAVE_FREQ", "1") == 0
    assert_same_run(settings.folder(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 5, 8])
def test_stopped_after_a_validation(settings, whole, stop_at, stop):
    """At the end of an epoch, the border and the end, between model.pt and the checkpoint."""
    expected = whole(settings, "WORKERS", 0)
    stop_at(stop, "valid")
    assert settings.train() == 130
    assert settings.resume() == 0
    assert_same_run(settings.folder(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "TRAIN.OPTIMIZER muon DEQ.F_START learned",
        "TRAIN.OPTIMIZER sgd TRAIN.NESTEROV True TRAIN.LR_SCHEDULER poly",
        "TRAIN.OPTIMIZER rmsprop TRAIN.LR_SCHEDULER step TRAIN.LR_STEP [1]",
        "MODEL.WNORM False TRAIN.CLIP 0.1 TRAIN.SHUFFLE False PRINT_FREQ 3",
        "DEQ.F_SOLVER anderson DEQ.B_SOLVER anderson TRAIN.BEGIN_EPOCH 1 TRAIN.END_EPOCH 3",
    ],
)
def test_other_settings(digits, stop_at, more):
    more = more.split()
    assert digits.train(*more, to="whole") == 0
    stop = 9 if "BEGIN_EPOCH" in more[-4] else 6
    stop_at(stop)
    code = digits.train(*more)
    assert code == 130
    assert digits.resume(*more) == 0
    assert_same_run(digits.folder(), digits.folder("whole"))


@pytest.mark.slow
def test_images_from_files(tmp_path, stop_at):
    """ImageNet's random crops and Cityscapes' random scales, in a worker."""
    write_imagenet(tmp_path / "imagenet", per_class=3, size=(40, 30))
    write_cityscapes(tmp_path / "city", n_train=6, size=(64, 32))
    common = "PERCENT 1 WORKERS 1 TRAIN.BATCH_SIZE_PER_GPU 2 TEST.BATCH_SIZE_PER_GPU 2".split()
    for kind, more in (
        (
            "cls",
            f"DATASET.DATASET imagenet DATASET.ROOT {tmp_path}/imagenet DATASET.TEST_SET val "
            "MODEL.IMAGE_SIZE [16,16]",
        ),
        (
            "seg",
            f"DATASET.DATASET cityscapes DATASET.ROOT {tmp_path}/city DATASET.NUM_CLASSES 19 "
            "DATASET.TRAIN_SET list/cityscapes/train.lst DATASET.TEST_SET list/cityscapes/val.lst "
            "TRAIN.BASE_SIZE 64 TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64 LOSS.USE_OHEM True "
            "LOSS.OHEMKEEP 100",
        ),
    ):
        settings = Settings(kind, tmp_path / kind)
        settings.dataset = more.split()[1]
        more = [*common, *more.split()]
        assert settings.train(*more, to="whole") == 0
        stop_at(4)
        assert settings.train(*more) == 130
        assert settings.resume(*more) == 0
        assert_same_run(settings.folder(), settings.folder("whole"))


def test_cut_off_last_line(digits, whole, interrupted):
    expected = whole(digits, "WORKERS", 0)
    interrupted(digits)
    with open(digits.folder() / METRICS, "a") as file:
        file.write('{"kind": "train", "st')
    assert digits.resume() == 0
    assert_same_run(digits.folder(), expected)


def test_the_log_goes_on(digits, interrupted):
    interrupted(digits)
    before = (digits.folder() / LOG).read_text()
    assert digits.resume() == 0
    after = (digits.folder() / LOG).read_text()
    assert after.startswith(before)
    assert f"continuing {digits.folder() / CHECKPOINT} at step 6" in after.removeprefix(before)
    assert "changed since" not in after


# ---- killed -------------------------------------------------------------------------------------


def kill_at(command, folder, step):
    """Run ``command`` and SIGKILL it as soon as metrics.jsonl shows ``step``; the last record."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not any(r["step"] >= step for r in read_metrics(folder)):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    return read_metrics(folder)[-1]["step"]


def killed_run(settings, kills, *more):
    """Train uninterrupted; then again, killed at ``kills`` and resumed each time."""
    assert settings.train(*more, to="whole") == 0
    command = [sys.executable, str(ROOM / "tools" / f"{settings.tool}.py"), *settings.argv(*more)]
    for kill in kills:
        died = kill_at(command, settings.folder(), kill)
        assert kill <= died, "the kill came too late to mean anything"
        assert 0 < load(settings.folder() / CHECKPOINT)["step"] <= died
        if command[-1] != "True":
            command += ["TRAIN.RESUME", "True"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"continuing {settings.folder() / CHECKPOINT} at step" in done.stdout
    assert_same_run(settings.folder(), settings.folder("whole"))


# Thirty steps, the border in the middle.
LONGER = "TRAIN.PRETRAIN_STEPS 15 PERCENT 0.048 TRAIN.END_EPOCH 2 SAVE_FREQ 4".split()


@pytest.mark.slow  # faults/test_kills.py kills runs by default
def test_killed(digits):
    killed_run(digits, (19,), *LONGER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills", "workers"),
    [("cls", (13, 14), 1), ("cls", (5,), 0), ("seg", (9, 21), 0), ("seg", (18, 26), 1)],
)
def test_killed_at_other_steps(kind, tmp_path, monkeypatch, kills, workers):
    settings = Settings(kind, tmp_path)
    as_the_command = {"train": 1000, "test": 200, "valid": 100}
    monkeypatch.setattr(digit_scenes, "N_SCENES", as_the_command)
    more = [*LONGER, "WORKERS", str(workers)]
    killed_run(settings, kills, *more, *(["PERCENT", "0.06"] if kind == "seg" else []))


# ---- going on -----------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(settings, finished, capsys):
    finished(settings)
    found, weights = records(settings.folder()), load(settings.folder() / WEIGHTS)
    checkpoint = load(settings.folder() / CHECKPOINT)
    capsys.readouterr()
    assert settings.resume() == 0
    assert f"at step {LAST}" in capsys.readouterr().out
    assert records(settings.folder()) == found
    assert list(differences(load(settings.folder() / WEIGHTS), weights)) == []
    assert list(differences(load(settings.folder() / CHECKPOINT), checkpoint)) == []


@pytest.mark.parametrize("key", ["TRAIN.RESUME", "AUTO_RESUME"])
def test_resume_without_a_checkpoint_starts_anew(digits, whole, key):
    assert digits.train(key, "True") == 0
    assert_same_run(digits.folder(), whole(digits, "WORKERS", 0))


def test_auto_resume_continues(digits, whole, stop_at):
    stop_at(7)
    assert digits.train("AUTO_RESUME", "True") == 130
    assert digits.train("AUTO_RESUME", "True") == 0
    assert_same_run(digits.folder(), whole(digits, "WORKERS", 0))


@pytest.mark.slow
def test_more_epochs(digits, capsys):
    """With a rate that does not depend on the number of epochs: as if they had been there."""
    steady = "TRAIN.LR_SCHEDULER step TRAIN.LR_STEP [9]".split()
    assert digits.train(*steady, "TRAIN.END_EPOCH", "3", to="whole") == 0
    assert digits.train(*steady) == 0
    capsys.readouterr()
    assert digits.resume(*steady, "TRAIN.END_EPOCH", "3") == 0
    assert "changed since the checkpoint: TRAIN.END_EPOCH from 2 to 3" in capsys.readouterr().out
    assert_same_run(digits.folder(), digits.folder("whole"))


def test_changed_settings_are_named_and_saved(digits, capsys):
    sgd = ["TRAIN.OPTIMIZER", "sgd"]
    assert digits.train(*sgd) == 0
    capsys.readouterr()
    more = [*sgd, "TRAIN.MOMENTUM", "0.5", "TRAIN.NESTEROV", "True"]
    more += "TRAIN.END_EPOCH 3 TRAIN.WD 0.5 TRAIN.LR 0.004 WORKERS 1 PRINT_FREQ 2 AMP bf16".split()
    more += "KEEP_CHECKPOINTS 3 MAX_TIME 600 TRAIN.MAX_SKIPPED 5 TEST.NUM_SAMPLES 7".split()
    assert digits.resume(*more) == 0
    out = capsys.readouterr().out
    changed = [line for line in out.splitlines() if line.startswith("changed since")]
    assert {line.split(": ")[1].split()[0] for line in changed} == {
        "AMP",
        "TEST.NUM_SAMPLES",
        "TRAIN.END_EPOCH",
        "TRAIN.LR",
        "TRAIN.MOMENTUM",
        "TRAIN.NESTEROV",
        "TRAIN.WD",
    }
    resolved = config.clone()
    merge_file(resolved, digits.folder() / CONFIG)
    assert (resolved.TRAIN.WD, resolved.TRAIN.LR) == (0.5, 0.004)
    (group,) = load(digits.folder() / CHECKPOINT)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.5, 0.5, True)
    last = [r for r in records(digits.folder()) if r["kind"] == "train"][-1]
    assert math.isclose(last["lr"], 1e-6 + (0.004 - 1e-6) * (1 + math.cos(math.pi * 11 / 12)) / 2)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("TRAIN.BEGIN_EPOCH 1", "TRAIN.BEGIN_EPOCH 1 has no effect on a run that goes on"),
        ("TRAIN.OPTIMIZER rmsprop TRAIN.MOMENTUM 0.5", "rmsprop's momentum False"),
        ("", "was saved with the training images "),  # which were replaced
    ],
)
def test_settings_that_a_resume_cannot_change(digits, finished, capsys, monkeypatch, more, named):
    if "rmsprop" in more:
        assert digits.train(*"TRAIN.OPTIMIZER rmsprop TRAIN.MOMENTUM 0".split()) == 0
    else:
        finished(digits)
    if not more:
        monkeypatch.setattr(DigitImages, "contents", lambda self: ["others"])
    capsys.readouterr()
    assert digits.resume(*more.split(), "TRAIN.END_EPOCH", "3") == 2
    assert named in capsys.readouterr().err


# ---- TRAIN.CHECKPOINT ---------------------------------------------------------------------------


def test_a_checkpoint_from_elsewhere(settings, whole, interrupted):
    """A fresh folder continues it; the folder it came from is not touched."""
    interrupted(settings)
    elsewhere = settings.parent / "kept"
    shutil.copytree(settings.folder(), elsewhere)
    before = {p.name: p.read_bytes() for p in elsewhere.iterdir()}
    assert settings.train("TRAIN.CHECKPOINT", elsewhere / CHECKPOINT, to="new") == 0
    assert {p.name: p.read_bytes() for p in elsewhere.iterdir()} == before
    expected = whole(settings, "WORKERS", 0)
    assert records(settings.folder("new")) == [r for r in records(expected) if r["step"] > 6]
    found = load(settings.folder("new") / CHECKPOINT)
    assert list(differences(found, load(expected / CHECKPOINT))) == []


@pytest.mark.slow
def test_a_checkpoint_from_elsewhere_without_its_settings(digits, capsys):
    assert digits.train() == 0
    elsewhere = digits.parent / "alone.pt"
    shutil.copy(digits.folder() / CHECKPOINT, elsewhere)
    capsys.readouterr()
    assert digits.train("TRAIN.CHECKPOINT", elsewhere, to="new") == 0
    assert f"{elsewhere.parent / CONFIG} is missing" in capsys.readouterr().out


def best_at_step_5(folder):
    """Make a checkpoint believe that no later validation can be better."""
    state = load(folder / CHECKPOINT)
    state["best"] |= {"phase": "equilibrium", "score": 1.0, "step": 5}
    torch.save(state, folder / CHECKPOINT)


def test_a_checkpoint_from_elsewhere_leaves_weights_to_evaluate(digits, finished):
    finished(digits)
    best_at_step_5(digits.folder())
    checkpoint = digits.folder() / CHECKPOINT
    assert digits.train("TRAIN.CHECKPOINT", checkpoint, "TRAIN.END_EPOCH", "3", to="new") == 0
    assert run_tool("cls_valid", *digits.argv(to="new")) == 0


def test_a_checkpoint_from_elsewhere_does_not_overwrite_a_run(digits, finished):
    finished(digits, to="elsewhere")
    finished(digits)
    before = {p.name: p.read_bytes() for p in digits.folder().iterdir()}
    checkpoint = digits.folder("elsewhere") / CHECKPOINT
    assert digits.train("TRAIN.CHECKPOINT", checkpoint) == 2
    assert {p.name: p.read_bytes() for p in digits.folder().iterdir()} == before


def test_its_own_checkpoint_by_name(digits, whole, interrupted):
    interrupted(digits)
    assert digits.resume("TRAIN.CHECKPOINT", digits.folder() / CHECKPOINT) == 0
    assert_same_run(digits.folder(), whole(digits, "WORKERS", 0))


def test_a_run_begun_from_a_checkpoint_continues_its_own(digits, whole, stop_at):
    """What a cluster starts again and again goes on, and does not go back to where it began."""
    stop_at(3)
    assert digits.train(to="first") == 130
    more = ["TRAIN.RESUME", "True", "TRAIN.CHECKPOINT", digits.folder("first") / CHECKPOINT]
    stop_at(7)
    assert digits.train(*more) == 130
    assert digits.train(*more) == 0
    log = (digits.folder() / LOG).read_text()
    assert f"continuing {digits.folder('first') / CHECKPOINT} at step 2" in log
    assert f"continuing {digits.folder() / CHECKPOINT} at step 6" in log
    expected = records(whole(digits, "WORKERS", 0))
    assert records(digits.folder()) == [r for r in expected if r["step"] > 2]


def test_pretrained_weights_need_not_be_there_any_more(digits, whole, stop_at):
    """The checkpoint holds them all."""
    weights = digits.parent / "first.pt"
    shutil.copy(whole(digits, "WORKERS", 0) / WEIGHTS, weights)
    stop_at(7)
    assert digits.train("MODEL.PRETRAINED", weights) == 130
    os.remove(weights)
    assert digits.resume("MODEL.PRETRAINED", weights) == 0
