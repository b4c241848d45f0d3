"""What the settings of training do, on runs that take a second."""

import math
from itertools import product

import pytest
import torch
import yaml

import small_digits
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, METRICS, WEIGHTS, read_metrics
from mdeq_vision import command
from mdeq_vision.command import CONFIG
from mdeq_vision.evaluation import Evaluation
from mdeq_vision.image_trainer import ImageTrainer
from mdeq_vision.model import MDEQNet
from mdeq_vision.schedules import OPTIMIZERS
from mdeq_vision.tasks import ClassificationTrainer
from small_digits import assert_same, of_kind, state_of
from small_runs import DIGITS, SCENES, run_tool

digits, quick = small_digits.digits, small_digits.quick  # fixtures
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
CPU = torch.device("cpu")
N_VALID, N_TEST = 179, 359  # digits


# ---- weight of the Jacobian loss -----------------------------------------------------------------


def test_the_weight_grows(digits):
    """By 0.1 every two steps at equilibrium: the factor of the log is the one of each step."""
    more = """
        LOSS.JAC_LOSS_FREQ 1 LOSS.JAC_LOSS_WEIGHT 3 LOSS.PRETRAIN_JAC_LOSS_WEIGHT 1
        LOSS.JAC_INCREMENTAL 2 TRAIN.END_EPOCH 3 TRAIN.PRETRAIN_STEPS 3
    """
    records = of_kind(digits(*more.split()), "train")
    weights = [r["jac_loss_weight"] for r in records]
    assert weights == pytest.approx([1, 1, 1, 3, 3, 3.1, 3.1, 3.2, 3.2])
    assert all(r["jac_loss"] > 0 for r in records)


@pytest.mark.parametrize("increment", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_no_increment(digits, increment):
    more = "LOSS.JAC_LOSS_FREQ 1 LOSS.JAC_LOSS_WEIGHT 3 LOSS.PRETRAIN_JAC_LOSS_WEIGHT 1".split()
    folder = digits(*more, "LOSS.JAC_INCREMENTAL", increment)
    assert [r["jac_loss_weight"] for r in of_kind(folder, "train")] == [1, 1, 1, 1, 3, 3]


# ---- schedules ----------------------------------------------------------------------------------


COMBINATIONS = [*product(OPTIMIZERS, ("cosine", "poly", "step"))]


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, c in enumerate(COMBINATIONS)],
)
def test_every_optimiser_with_every_schedule(digits, optimizer, schedule):
    more = f"TRAIN.OPTIMIZER {optimizer} TRAIN.LR_SCHEDULER {schedule} TRAIN.LR 0.01"
    folder = digits(*more.split(), *"TRAIN.LR_STEP [1,2] TRAIN.END_EPOCH 3".split())
    expected = {
        "cosine": [1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * n / 9)) / 2 for n in range(9)],
        "poly": [0.01 * (1 - n / 9) ** 0.9 for n in range(9)],
        "step": [0.01] * 3 + [0.001] * 3 + [0.0001] * 3,
    }[schedule]
    records = of_kind(folder, "train")
    assert [r["lr"] for r in records] == pytest.approx(expected, rel=1e-12)
    # PRETRAIN_STEPS counts optimiser steps, whatever the schedule.
    assert ["backward_nfe" in r for r in records] == [False] * 4 + [True] * 5
    assert all(math.isfinite(r["loss"]) for r in records)


def test_begin_epoch(digits):
    records = of_kind(digits("TRAIN.BEGIN_EPOCH", 1), "train")
    assert [r["step"] for r in records] == [4, 5, 6]


# ---- validations, checkpoints, log --------------------------------------------------------------


def test_a_run_crosses_the_border(digits):
    valid = of_kind(digits(), "valid")
    assert [(r["step"], r["phase"]) for r in valid] == [
        (3, "stacked"),
        (4, "stacked"),
        (6, "equilibrium"),
    ]
    assert [r["nfe"] > 0 for r in valid] == [False, False, True]
    assert {p.name for p in digits.folder.iterdir()} >= {LOG, METRICS, CONFIG, CHECKPOINT, WEIGHTS}


@pytest.mark.parametrize("border", [0, 6])
def test_runs_of_one_phase(digits, border):
    folder = digits("TRAIN.PRETRAIN_STEPS", border)
    phases = {r["phase"] for r in of_kind(folder, "valid")}
    assert phases == {"stacked" if border else "equilibrium"}


@pytest.fixture
def scripted(monkeypatch):
    """Validations with these scores, and tests that count up; the weights that each of them saw."""

    def script(*scores):
        seen, left = [], iter(scores)

        def evaluate(cfg, model, dataset, **options):
            of_test = len(dataset) == N_TEST
            assert of_test or len(dataset) == N_VALID
            score = len(seen) / 100 if of_test else next(left)
            seen.append(state_of(model))
            figures = {"loss": 1.0, "top1": score, "top5": 1.0, "nfe": 0.0}
            return Evaluation("top1", 1, figures | {"abs_residual": 0.0, "rel_residual": 0.0})

        monkeypatch.setattr(ClassificationTrainer, "evaluator", staticmethod(evaluate))
        monkeypatch.setattr(ClassificationTrainer, "rehearse", lambda trainer: None)
        return seen

    return script


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((0.9, 0.8, 0.5, 0.7, 0.6), 3),  # not of the stacked phase, however good
        ((0.1, 0.2, 0.3, 0.4, 0.5), 4),
        ((0.1, 0.2, 0.0, 0.0, 0.0), 2),  # the first of equals
    ],
)
def test_best_and_last(digits, scripted, scores, best):
    """Chosen by the validations; both are tested at the end, on other images."""
    seen = scripted(*scores)
    folder = digits("TRAIN.END_EPOCH", 4)  # after 3, 4 (the border), 6, 9 and 12 steps
    assert_same(load(folder / WEIGHTS), seen[best])
    checkpoint = load(folder / CHECKPOINT)
    assert_same(checkpoint["state_dict"], seen[4])
    step = (3, 4, 6, 9, 12)[best]
    assert_same(seen[5], seen[4])
    if best != 4:
        assert_same(seen[6], seen[best])
    tested = [(r["weights"], r["of_step"], r["top1"]) for r in of_kind(folder, "final_test")]
    assert tested == [("last", 12, 0.05), ("best", step, 0.05 if best == 4 else 0.06)]
    assert checkpoint["best"]["step"] == step
    line = f"best top1 {100 * scores[best]:.2f}% at step {step} (equilibrium)"
    assert line in (folder / LOG).read_text()


def test_the_best_of_a_stacked_run(digits, scripted):
    seen = scripted(0.3, 0.8, 0.5)
    folder = digits("TRAIN.END_EPOCH", 3, "TRAIN.PRETRAIN_STEPS", 100)
    assert_same(load(folder / WEIGHTS), seen[1])


def test_lines_between_are_means(digits, tmp_path):
    assert run_tool("cls_train", *digits.argv("--modelDir", tmp_path / "each")) == 0
    each = of_kind(tmp_path / "each/digits" / DIGITS.stem, "train")
    folder = digits("PRINT_FREQ", 3, "TRAIN.END_EPOCH", 2)
    found = of_kind(folder, "train")
    assert [r["step"] for r in found] == [3, 4, 6]  # and at the border
    for record, steps in zip(found, ((1, 2, 3), (4,), (5, 6)), strict=True):
        covered = [r for r in each if r["step"] in steps]
        for name in ("loss", "accuracy", "forward_nfe", "backward_rel_residual"):
            if name in record:
                mean = sum(r[name] for r in covered) / len(steps)
                assert record[name] == pytest.approx(mean, rel=1e-6)
        with_jac = [r["jac_loss"] for r in covered if "jac_loss" in r]
        assert ("jac_loss" in record) == bool(with_jac)
        if with_jac:
            assert record["jac_loss"] == pytest.approx(sum(with_jac) / len(with_jac), rel=1e-6)


@pytest.mark.parametrize(("percent", "steps"), [(0.02, 6), (0.0001, 1)])
def test_percent(digits, percent, steps):
    """Of 360 batches of four, the last of two images."""
    folder = digits("--percent", percent, "TRAIN.END_EPOCH", 1, "TRAIN.PRETRAIN_STEPS", 1)
    assert [r["step"] for r in of_kind(folder, "train")] == list(range(1, steps + 1))


@pytest.mark.parametrize("tool", ["cls_train", "seg_train"])
def test_debug_writes_nothing(digits, tmp_path, capsys, tool):
    argv = digits.argv("DEBUG.DEBUG", "True", "LOG_DIR", tmp_path / "logs")
    if tool == "seg_train":
        argv = ["--cfg", SCENES, *argv[2:], "TRAIN.IMAGE_SIZE", "[32,32]", "PERCENT", "0.3"]
    assert run_tool(tool, *argv) == 0
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "debug: nothing is written" in out
    assert "step 6 | valid (equilibrium)" in out


def test_log_dir(digits, tmp_path):
    folder = digits("--logDir", tmp_path / "logs", "TRAIN.END_EPOCH", 0)
    assert len(list((tmp_path / "logs/digits" / DIGITS.stem).glob("events.*"))) == 1
    assert list(folder.glob("events.*")) == []


def test_events_lie_beside_the_run(digits):
    assert len(list(digits("TRAIN.END_EPOCH", 0).glob("events.*"))) == 1


@pytest.mark.parametrize(("batch", "warned"), [(32, False), (16, True)])
def test_effective_batch_size(digits, batch, warned):
    more = ["TRAIN.BATCH_SIZE_PER_GPU", batch, "TRAIN.END_EPOCH", 0]
    log = (digits(*more) / LOG).read_text()
    assert f"effective batch size {batch}\n" in log
    assert ("is meant for an effective batch size of 32" in log) == warned


@pytest.mark.slow
def test_an_effective_batch_of_several_gpus(digits, tmp_path):
    """What the file asks for is BATCH_SIZE_PER_GPU on each of its GPUS."""
    settings = yaml.safe_load(DIGITS.read_text()) | {"GPUS": [0, 1]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    digits.folder = tmp_path / "digits" / "own"
    assert run_tool("cls_train", "--cfg", tmp_path / "own.yaml", *digits.argv()[2:]) == 0
    log = (digits.folder / LOG).read_text()
    assert "effective batch size 4\n" in log
    assert "effective batch size of 64 (32 on each of 2 GPU(s))" in log


def test_a_weight_without_effect_is_noted(digits):
    more = ["LOSS.JAC_LOSS_FREQ", 0, "LOSS.PRETRAIN_JAC_LOSS_WEIGHT", 0.1, "TRAIN.END_EPOCH", 0]
    log = (digits(*more) / LOG).read_text()
    for key in ("JAC_LOSS_WEIGHT", "PRETRAIN_JAC_LOSS_WEIGHT"):
        assert f"note: LOSS.{key} has no effect while LOSS.JAC_LOSS_FREQ is 0" in log


def test_spectral_radius_in_validation(digits):
    folder = digits("DEQ.SPECTRAL_RADIUS_MODE", "True")
    valid = of_kind(folder, "valid")
    assert ["sradius" in r for r in valid] == [False, False, True]
    assert 0 < valid[-1]["sradius"] < 100
    assert f"spectral radius {valid[-1]['sradius']:.3f}" in (folder / LOG).read_text()


@pytest.mark.slow
def test_it_changes_no_figure(digits, tmp_path):
    """The evaluated output is that of a run without it."""
    plain = digits()
    argv = digits.argv("--modelDir", tmp_path / "other", "DEQ.SPECTRAL_RADIUS_MODE", "True")
    assert run_tool("cls_train", *argv) == 0
    with_radius = of_kind(tmp_path / "other/digits" / DIGITS.stem, "valid")
    for a, b in zip(of_kind(plain, "valid"), with_radius, strict=True):
        assert {k: v for k, v in b.items() if k != "sradius"} == a


def test_summary_and_places_are_in_the_log(digits):
    log = (digits("TRAIN.END_EPOCH", 1) / LOG).read_text()
    n = sum(v.numel() for k, v in load(digits.folder / WEIGHTS).items() if is_parameter(k))
    assert f"Total params: {n:,}" in log
    assert f"{n} parameters | cpu | 1 process(es)" in log
    assert f"run folder {digits.folder}" in log
    assert "1259 training and 179 validation images" in log


def test_outputs_without_a_class_are_noted(digits, capsys):
    """Weights of another data set may number the classes otherwise: nothing else would show it."""
    note = "note: the 10 classes of digits are outputs 0 to 9 of 12"
    more = ["MODEL.NUM_CLASSES", 12, "TRAIN.END_EPOCH", 1]
    assert note in (digits(*more) / LOG).read_text()
    capsys.readouterr()
    assert run_tool("cls_valid", *digits.argv(*more)) == 0
    out = capsys.readouterr().out
    assert out.startswith(note)
    assert (
        run_tool(
            "cls_train", *digits.argv("--modelDir", digits.folder / "own", "TRAIN.END_EPOCH", 0)
        )
        == 0
    )
    assert "note: the 10 classes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "more"),
    [
        ("cls_train", "TRAIN.EXTRA_EPOCH 2 DATASET.EXTRA_TRAIN_SET list/extra.lst"),
        ("cls_train", "LOSS.USE_OHEM True"),
        ("cls_train", "TRAIN.FLIP False"),
        ("cls_train", "TRAIN.MULTI_SCALE False"),
        ("cls_valid", "TEST.CENTER_CROP_TEST True"),
        ("cls_valid", "TEST.FLIP_TEST True"),
        ("cls_valid", "TEST.MULTI_SCALE True"),
        ("seg_train", "DATASET.AUGMENT False"),
        ("seg_test", "DATASET.AUGMENT False"),
    ],
)
def test_what_the_task_cannot_do_is_refused(digits, capsys, tool, more):
    *_, key, value = more.split()
    task = {"cls": "classification", "seg": "segmentation"}
    other = task["seg" if tool.startswith("cls") else "cls"]
    assert run_tool(tool, *digits.argv(*more.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"{key} {value if value in ('True', 'False') else repr(value)} is a setting of {other}"
        in line
    )
    assert line.endswith(f"{task[tool[:3]]} makes no use of it")
    assert not digits.folder.exists()


def test_keys_of_the_open_section_that_have_no_effect_are_noted(digits):
    log = (digits("MODEL.EXTRA.STEM_INPLANES", 64, "TRAIN.END_EPOCH", 0) / LOG).read_text()
    assert "note: MODEL.EXTRA.STEM_INPLANES has no effect" in log
    assert log.count("has no effect") == 1


def test_number_formats(digits, monkeypatch):
    """AMP and TF32 reach both phases, the loss is of float32 scores, and evaluation follows."""
    allowed, seen = [], set()
    monkeypatch.setattr(command, "allow_tf32", allowed.append)
    original = MDEQNet.forward

    def forward(self, x, *args, **kwargs):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(MDEQNet, "forward", forward)
    monkeypatch.setattr(ClassificationTrainer, "loss", float32_only(ClassificationTrainer.loss))
    folder = digits("AMP", "bf16", "TF32", "True")
    assert allowed == [True]
    assert seen == {(True, True), (False, True)}
    assert all(math.isfinite(r["loss"]) for r in of_kind(folder, "train"))
    assert run_tool("cls_valid", *digits.argv("AMP", "bf16")) == 0


def float32_only(loss):
    def checked(self, output, target):
        assert output.dtype == torch.float32
        return loss(self, output, target)

    return checked


def is_parameter(key):
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_model_file(digits, tmp_path, monkeypatch):
    weights = load(digits("TRAIN.END_EPOCH", 1) / WEIGHTS)
    started = []
    monkeypatch.setattr(
        ImageTrainer, "train", lambda self, *run: started.append(state_of(self.model))
    )
    more = ["--modelDir", tmp_path / "next", "TRAIN.MODEL_FILE", digits.folder / WEIGHTS]
    assert run_tool("cls_train", *digits.argv(*more)) == 0
    assert_same(started[0], weights)


def test_no_epochs(digits):
    folder = digits("TRAIN.END_EPOCH", 0)
    assert [r["kind"] for r in read_metrics(folder)] == ["summary"]
    assert not (folder / WEIGHTS).exists()


# ---- what is computed is the same ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_same_seed_same_run(digits, tmp_path, workers):
    expected = [r.get("loss") for r in read_metrics(digits())]
    other = tmp_path / "other"
    argv = digits.argv("--modelDir", other, "WORKERS", workers)
    assert run_tool("cls_train", *argv) == 0
    folder = other / "digits" / DIGITS.stem
    assert [r.get("loss") for r in read_metrics(folder)] == expected
    assert_same(load(folder / WEIGHTS), load(digits.folder / WEIGHTS))


@pytest.mark.slow
def test_another_seed_another_run(digits, tmp_path):
    expected = [r["loss"] for r in of_kind(digits(), "train")]
    assert run_tool("cls_train", *digits.argv("--modelDir", tmp_path / "o", "SEED", 2)) == 0
    found = [r["loss"] for r in of_kind(tmp_path / "o/digits" / DIGITS.stem, "train")]
    assert all(a != b for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_validation_draws_nothing(digits, scripted, tmp_path):
    """Losses of training do not depend on what a validation does."""
    expected = [r["loss"] for r in of_kind(digits(), "train")]
    scripted(0.1, 0.2, 0.3)
    assert run_tool("cls_train", *digits.argv("--modelDir", tmp_path / "o")) == 0
    found = [r["loss"] for r in of_kind(tmp_path / "o/digits" / DIGITS.stem, "train")]
    assert found == expected


@pytest.mark.slow
def test_it_learns(digits):
    """On images that it was not trained on, too."""
    more = """
        TRAIN.BATCH_SIZE_PER_GPU 32 PERCENT 1 TRAIN.END_EPOCH 1 TRAIN.PRETRAIN_STEPS 30
        TRAIN.LR 0.01 TEST.NUM_SAMPLES 0 PRINT_FREQ 15 SAVE_FREQ 0 MODEL.DROPOUT 0
    """
    folder = digits(*more.split())
    losses = [r["loss"] for r in of_kind(folder, "train")]
    assert losses[-1] < losses[0] - 0.2
    assert of_kind(folder, "valid")[-1]["loss"] < losses[0] - 0.2


@pytest.fixture
def nan_at(monkeypatch):
    """``nan_at(*steps)`` makes the training loss of those steps NaN."""
    real = ClassificationTrainer.loss

    def patch(*steps):
        def loss(self, output, target):
            total, weight = real(self, output, target)
            return total * (math.nan if self.step in steps else 1.0), weight

        monkeypatch.setattr(ClassificationTrainer, "loss", loss)

    return patch


@pytest.mark.parametrize("step", [1, 4], ids=["stacked", "equilibrium"])
def test_a_loss_that_is_not_finite_costs_one_step(digits, nan_at, step):
    """Its batch leaves no trace in weights, statistics or optimiser; the run goes on."""
    nan_at(step)
    folder = digits("SAVE_FREQ", 1, "KEEP_CHECKPOINTS", 6)
    (skipped,) = of_kind(folder, "skipped")
    assert skipped["step"] == step + 1
    assert math.isnan(skipped["loss"])
    assert f"step {step + 1} | skipped: the loss is nan" in (folder / LOG).read_text()
    before, after = (load(folder / f"checkpoint.{5 - k}.pt") for k in (step - 1, step))
    assert (before["step"], after["step"]) == (step, step + 1)
    assert_same(before["state_dict"], after["state_dict"])
    steps = [{p["step"].item() for p in s["optimizer"]["state"].values()} for s in (before, after)]
    assert steps == [{step}, {step}]
    assert of_kind(folder, "summary")[-1]["skipped"] == 1
    assert load(folder / CHECKPOINT)["step"] == 6
    assert all(v.isfinite().all() for v in load(folder / WEIGHTS).values())


def test_too_many_in_a_row_end_the_run(digits, nan_at, capsys):
    """Exit code 1, one line with the last good state, whose weights are finite."""
    nan_at(1, 3, 4)
    assert run_tool("cls_train", *digits.argv("TRAIN.MAX_SKIPPED", 2)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "cls_train.py: 2 steps in a row were not finite, the last one at step 5: lower TRAIN.LR"
    )
    assert str(digits.folder / CHECKPOINT) in line
    state = load(digits.folder / CHECKPOINT)
    assert state["step"] == 4
    assert all(v.isfinite().all() for v in state["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(digits, monkeypatch, capsys):
    """A rate beyond all bounds spoils them although no gradient was to blame."""
    real = ClassificationTrainer.set_learning_rate

    def rate(self):
        real(self)
        for group in self.optimizer.param_groups:
            group["lr"] *= math.nan if self.step == 4 else 1.0

    monkeypatch.setattr(ClassificationTrainer, "set_learning_rate", rate)
    assert run_tool("cls_train", *digits.argv("SAVE_FREQ", 1)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights are not finite" in line
    assert load(digits.folder / CHECKPOINT)["step"] == 4
    assert all(v.isfinite().all() for v in load(digits.folder / WEIGHTS).values())
