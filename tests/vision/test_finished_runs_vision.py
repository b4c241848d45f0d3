"""What can be done with a run: evaluate it, train with its settings; and what it leaves alone."""

import random
import re
from pathlib import Path

import pytest
import torch

import small_digits
from lib.runs.checkpoint import load
from lib.runs.processes import Processes
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, Run, read_metrics
from mdeq_vision import command
from mdeq_vision.command import CONFIG
from mdeq_vision.datasets import get_cls_dataset
from mdeq_vision.evaluation import evaluate_classification
from mdeq_vision.model import get_cls_net
from mdeq_vision.options import experiment_parser
from small_digits import SMALL, of_kind
from small_runs import DIGITS, SCENES, TINY, run_tool

digits, quick = small_digits.digits, small_digits.quick  # fixtures
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
CPU = torch.device("cpu")


# ---- evaluating a run ---------------------------------------------------------------------------


def test_cls_valid_prints_the_test_of_the_best_weights(digits, capsys):
    folder = digits("TEST.NUM_SAMPLES", 0, "TEST.BATCH_SIZE_PER_GPU", 64)
    log = (folder / LOG).read_text()
    (line,) = re.findall(r"test, best weights \(step 6\) \| (.*)", log)
    capsys.readouterr()
    argv = digits.argv("TEST.NUM_SAMPLES", 0, "TEST.BATCH_SIZE_PER_GPU", 64)
    assert run_tool("cls_valid", *argv) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith(line)
    assert f"{folder / WEIGHTS} | 359 images" in out
    assert run_tool("cls_valid", *argv, "--testModel", folder / CHECKPOINT) == 0  # the last
    assert line in capsys.readouterr().out


def test_cls_valid_writes_nothing(digits, tmp_path):
    digits()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run_tool("cls_valid", *digits.argv()) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_figures_do_not_depend_on_the_batch_size(digits):
    """In the stacked network: a solver looks at the whole batch."""
    digits()
    found = []
    for size in (1, 5, 100):
        argv = digits.argv("TEST.BATCH_SIZE_PER_GPU", size, "TEST.NUM_SAMPLES", 12)
        cfg = command.load_config(experiment_parser("", "").parse_intermixed_args(argv))
        model, data = get_cls_net(cfg), get_cls_dataset(cfg, "test")
        model.load_state_dict(load(digits.folder / WEIGHTS))
        options = {"train_step": 0, "device": CPU, "processes": Processes()}
        figures = evaluate_classification(cfg, model, data, **options).figures
        found.append([figures[name] for name in ("loss", "top1", "top5")])
    for figures in found:
        assert figures == pytest.approx(found[0], rel=1e-5)


# ---- settings -----------------------------------------------------------------------------------


def test_the_saved_settings_make_the_same_run(digits, tmp_path):
    """config.yaml is a --cfg of its own."""
    folder = digits()
    argv = ["--cfg", folder / CONFIG, "--modelDir", tmp_path / "again"]
    assert run_tool("cls_train", *argv) == 0
    again = tmp_path / "again" / "digits" / "config"
    assert [r.get("loss") for r in read_metrics(again)] == [
        r.get("loss") for r in read_metrics(folder)
    ]


def test_saved_settings_know_where_the_data_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--cfg", str(DIGITS), "--dataDir", "disk", "DATASET.ROOT", "data"]
    cfg = command.load_config(experiment_parser("", "").parse_intermixed_args(argv))
    assert cfg.DATASET.ROOT == "disk/data"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = command.load_config(
        experiment_parser("", "").parse_intermixed_args(["--cfg", "config.yaml"])
    )
    assert again.DATASET.ROOT == "disk/data"


@pytest.mark.slow
def test_random_state_of_python_is_left_alone(digits):
    """A notebook's own draws do not change with a run in between."""
    random.seed(3)
    expected = random.random()
    random.seed(3)
    digits()
    assert random.random() == expected


def test_run_writes_only_to_its_folders(digits, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    digits()
    assert list(Path.cwd().iterdir()) == []
    assert [p.name for p in tmp_path.iterdir() if p.name != "here"] == ["digits"]


def test_segmentation_trains_on_scenes(tmp_path):
    """mIoU above that of background alone after some steps; figures in the log."""
    more = """
        TRAIN.IMAGE_SIZE [32,32] PERCENT 0.8 TRAIN.END_EPOCH 2 TRAIN.PRETRAIN_STEPS 10
        TRAIN.LR 0.01 LOSS.USE_OHEM True LOSS.OHEMKEEP 100
    """.split()
    argv = ["--cfg", SCENES, "--modelDir", tmp_path, *TINY, *SMALL, *more]
    assert run_tool("seg_train", *argv) == 0
    folder = tmp_path / "digit_scenes" / SCENES.stem
    valid = of_kind(folder, "valid")
    assert [(r["step"], r["phase"]) for r in valid] == [
        (8, "stacked"),
        (10, "stacked"),
        (16, "equilibrium"),
    ]
    for name in ("mIoU", "pixel_accuracy", "mean_accuracy"):
        assert all(0 <= r[name] <= 1 for r in valid)
    assert "mIoU" in (folder / LOG).read_text()
    losses = [r["loss"] for r in of_kind(folder, "train")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_run_class_is_given_all_records(digits, monkeypatch):
    """Every number of metrics.jsonl is a TensorBoard scalar of the same name."""
    seen = set()
    real = Run.record

    def record(self, kind, step, **values):
        seen.update(f"{kind}/{name}" for name in values)
        real(self, kind, step, **values)

    monkeypatch.setattr(Run, "record", record)
    folder = digits("LOSS.JAC_LOSS_FREQ", 1)
    assert {"train/loss", "train/accuracy", "train/lr", "train/jac_loss", "valid/top1"} <= seen
    places = {"kind", "step"}
    in_file = {f"{r['kind']}/{k}" for r in read_metrics(folder) for k in r.keys() - places}
    assert in_file == seen
