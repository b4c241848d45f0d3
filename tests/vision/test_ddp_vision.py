"""Segmentation in two processes on the CPU (gloo) against one process with the doubled batch.

Two processes run this file as a script and go through all cases of a single step; the commands
run under torchrun. ``python tests/vision/test_ddp_vision.py`` prints the largest differences.
"""

import contextlib
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import lib.deq
import mdeq_vision.model
from image_files import write_cityscapes
from lib.checkpoint import load
from lib.distributed import Processes
from lib.experiment import CHECKPOINT, LOG, WEIGHTS, read_metrics
from mdeq_vision.evaluation import evaluate_segmentation
from mdeq_vision.tasks import SegmentationTrainer
from small_runs import DIGITS, ROOM, SCENES, TINY, TINY_DIGITS, run_tool
from small_vision import EQUILIBRIUM, STACKED, build, freeze_batch_norm, images, tiny_config

EACH, SIDE, STEPS, N_CLASSES = 2, 12, 3, 4  # samples of a process; side of an image
TOLERANCE = 1e-5
WEIGHTS_OF_CLASSES = (0.5, 2.0, 1.0, 3.0)

# Name -> changes of the settings, class weights, share of ignored pixels of each process.
UNEVEN = (0.8, 0.1)
CASES = {
    "class weights": ({}, WEIGHTS_OF_CLASSES, UNEVEN),
    "equal weights": ({"WNORM": True}, None, UNEVEN),
    "one process without a label": ({}, WEIGHTS_OF_CLASSES, (1.0, 0.3)),
    "no label at all": ({}, WEIGHTS_OF_CLASSES, (1.0, 1.0)),
    # The threshold is the given one, so that it does not depend on the process.
    "OHEM": (
        {"LOSS__USE_OHEM": True, "LOSS__OHEMKEEP": 0, "LOSS__OHEMTHRES": 0.4},
        WEIGHTS_OF_CLASSES,
        UNEVEN,
    ),
    "Jacobian loss": (
        {"LOSS__JAC_LOSS_FREQ": 1.0, "LOSS__JAC_LOSS_WEIGHT": 2.0},
        WEIGHTS_OF_CLASSES,
        UNEVEN,
    ),
    "clipped": ({"TRAIN__CLIP": 0.01}, WEIGHTS_OF_CLASSES, UNEVEN),
    "four branches": ({"branches": 4, "DOWNSAMPLE_TIMES": 1}, WEIGHTS_OF_CLASSES, UNEVEN),
}
SETTINGS = {
    "DATASET__NUM_CLASSES": N_CLASSES,
    "DEQ__B_THRES": 400,
    "DEQ__F_THRES": 400,
    "DEQ__RAND_F_THRES_DELTA": 0,
    "LOSS__PRETRAIN_JAC_LOSS_WEIGHT": 1.0,
    "TEST__BASE_SIZE": SIDE,
    "TRAIN__IGNORE_LABEL": 255,
    "TRAIN__LR": 0.05,
    "TRAIN__OPTIMIZER": "sgd",
}
QUICK = ("class weights", "one process without a label", "Jacobian loss")
REST = tuple(case for case in CASES if case not in QUICK)
PHASES = {"stacked": STACKED, "equilibrium": EQUILIBRIUM}
NORMS = ("synchronised", "eval")


class Data:
    """Stands for a data set of five images; the last batch is not full."""

    has_labels = True

    def __init__(self, class_weights):
        self.facts = SimpleNamespace(class_weights=class_weights)
        self.images, labels = batch(0, (0.2,), 5)
        self.labels = labels[:, :SIDE, :SIDE]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def batch(step, ignored, n):
    """Images (n, 3, SIDE, SIDE) and labels at twice that; n / len(ignored) of each share."""
    generator = torch.Generator().manual_seed(10 + step)
    shape = (n, 2 * SIDE, 2 * SIDE)
    label = torch.randint(N_CLASSES, shape, generator=generator)
    shares = torch.tensor(ignored).repeat_interleave(n // len(ignored)).view(n, 1, 1)
    label[torch.rand(shape, generator=generator) < shares] = 255
    return images(SIDE, SIDE, batch=n, seed=step), label


def ones_jac_loss(f0, z0, vecs=2, create_graph=True):
    """The estimate with a vector of ones: the real one draws in each process what it likes."""
    (product,) = torch.autograd.grad(f0.sum(), z0, create_graph=True)
    return product.square().sum() / z0.numel()


def make_trainer(case, phase, norm, processes):
    changes, class_weights, _ = CASES[case]
    settings = {**SETTINGS, **changes}
    settings["TRAIN__PRETRAIN_STEPS"] = 100 if phase == "stacked" else 0
    settings["TRAIN__BATCH_SIZE_PER_GPU"] = 2 * EACH // processes.world_size
    branches = settings.pop("branches", 2)
    cfg, model = tiny_config(branches, **settings), build("seg", branches, **settings)
    cfg.WORKERS = 0
    data = Data(class_weights)
    trainer = SegmentationTrainer(cfg, model, data, data, torch.device("cpu"), [], processes)
    trainer.parallel.train()
    if norm == "eval":
        freeze_batch_norm(trainer.model)
    return trainer


def steps(case, phase, norm, processes):
    """Loss and gradients of a first step, and what some steps have made of the model."""
    trainer = make_trainer(case, phase, norm, processes)
    mine = slice(0, 2 * EACH)
    if processes.world_size > 1:
        mine = slice(EACH * processes.rank, EACH * (processes.rank + 1))
    found = {"losses": []}
    for step in range(STEPS if phase == "stacked" else 2):
        image, label = batch(step, CASES[case][2], 2 * EACH)
        trainer._update(image[mine], label[mine])
        found["losses"].append(trainer._window["loss"].item())
        if step == 0:
            found["grads"] = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    found["state"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    found["hits"] = trainer._window["hits"].clone()
    return found


def evaluation(processes):
    """The confusion matrix, loss and indices of five images, two to a batch of a process."""
    trainer = make_trainer("class weights", "stacked", "eval", processes)
    cfg = trainer.cfg
    cfg.TEST.BATCH_SIZE_PER_GPU = 2 if processes.world_size == 1 else 1
    seen = []
    found = evaluate_segmentation(
        cfg,
        trainer.model,
        trainer.valid_set,
        train_step=0,
        device=torch.device("cpu"),
        processes=processes,
        on_prediction=lambda index, _: seen.append(index),
    )
    return {"matrix": found.confusion.matrix, "figures": found.figures, "seen": seen}


@contextlib.contextmanager
def the_same_vectors():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.deq, "jac_loss_estimate", ones_jac_loss)
        patch.setattr(mdeq_vision.model, "jac_loss_estimate", ones_jac_loss)
        yield


def all_cases(processes, cases):
    with the_same_vectors():
        return {
            (case, phase, norm): steps(case, phase, norm, processes)
            for case in cases
            for phase in PHASES
            for norm in NORMS
        }


# ---- what a process does ------------------------------------------------------------------------


def work(rank: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    processes = Processes(rank, 2, rank)
    found = {"steps": all_cases(processes, cases), "evaluation": evaluation(processes)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_two(folder: Path, cases) -> list[dict]:
    """What the two processes found."""
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder), *cases])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two processes found in a group of cases, and what one process found."""
    made = {}

    def get(cases):
        if cases not in made:
            folder = tmp_path_factory.mktemp("two")
            made[cases] = run_two(folder, cases), all_cases(Processes(), cases)
        return made[cases]

    return get


def largest(found, expected):
    """Largest difference of losses, gradients (to the largest gradient) and state."""
    scale = max(g.abs().max().item() for g in expected["grads"].values()) or 1.0
    return {
        "loss": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "gradient": max(
            (found["grads"][n] - g).abs().max().item() / scale for n, g in expected["grads"].items()
        ),
        "state": max(
            (found["state"][n] - v).abs().max().item() for n, v in expected["state"].items()
        ),
    }


# ---- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)]
)
def test_two_processes_are_one_with_the_doubled_batch(measured, case, phase, norm):
    both, alone = measured(QUICK if case in QUICK else REST)
    expected = alone[case, phase, norm]
    for found in both:
        found = found["steps"][case, phase, norm]
        assert found["grads"].keys() == expected["grads"].keys()
        assert all(value < TOLERANCE for value in largest(found, expected).values())
        assert torch.equal(found["hits"], expected["hits"])
    none = case == "no label at all"
    assert (max(expected["losses"]) == 0) == none
    # Every parameter takes part, and the running statistics move in training only.
    still = [n for n, g in expected["grads"].items() if not g.any()]
    assert (len(still) == len(expected["grads"])) == none
    before = build("seg", CASES[case][0].get("branches", 2)).state_dict()
    name = "downsample.1.running_mean"
    assert torch.equal(expected["state"][name], before[name]) == (norm == "eval")


def test_both_processes_hold_the_same_bits(measured):
    both, _ = measured(QUICK)
    a, b = (found["steps"] for found in both)
    for key, found in a.items():
        for part in ("grads", "state"):
            assert [n for n, t in found[part].items() if not torch.equal(t, b[key][part][n])] == []


def test_every_image_is_evaluated_once(measured):
    both, _ = measured(QUICK)
    expected = evaluation(Processes())
    assert sorted(both[0]["evaluation"]["seen"] + both[1]["evaluation"]["seen"]) == [0, 1, 2, 3, 4]
    assert both[0]["evaluation"]["seen"] != []
    for found in both:
        found = found["evaluation"]
        assert torch.equal(found["matrix"], expected["matrix"])
        assert found["matrix"].sum() == (Data(None).labels != 255).sum()
        assert found["figures"]["mIoU"] == expected["figures"]["mIoU"]
        assert found["figures"]["loss"] == pytest.approx(expected["figures"]["loss"], abs=1e-12)


# ---- the commands under torchrun ----------------------------------------------------------------

STAGE = "MODEL.EXTRA.FULL_STAGE"
# Two epochs of three steps, the border after the fourth; what a step draws is switched off.
SHORT = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.BIG_KERNELS [0,0] {STAGE}.HEAD_CHANNELS [4,4] WORKERS 0
""".split()
SHORT_SCENES = [*TINY, *"TRAIN.IMAGE_SIZE [32,32] PERCENT 0.0122".split(), *SHORT]
SURE = "MODEL.DROPOUT 0 LOSS.JAC_LOSS_FREQ 0 TRAIN.OPTIMIZER sgd TRAIN.LR 0.01".split()


def torchrun(tool, *argv, timeout=180):
    """A tool, or a script, in two processes."""
    script = ROOM / "tools" / f"{tool}.py" if isinstance(tool, str) else tool
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command += [str(script), *map(str, argv)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def scenes(folder, each, *more):
    argv = ["--cfg", SCENES, "--modelDir", folder, *SHORT_SCENES]
    return [*argv, "TRAIN.BATCH_SIZE_PER_GPU", each, *map(str, more)]


def run_of(folder):
    return folder / "digit_scenes" / SCENES.stem


@pytest.mark.slow
def test_seg_train_under_torchrun(tmp_path):
    done = torchrun("seg_train", *scenes(tmp_path / "two", 2, *SURE, "TEST.NUM_SAMPLES", 7))
    assert done.returncode == 0, done.stderr
    assert run_tool("seg_train", *scenes(tmp_path / "one", 4, *SURE, "TEST.NUM_SAMPLES", 7)) == 0
    two, one = run_of(tmp_path / "two"), run_of(tmp_path / "one")

    # The first process alone writes and prints.
    assert len(list(two.glob("events.*"))) == 1
    log = (two / LOG).read_text()
    assert log.count("step 6 | valid") == 1
    assert done.stdout.count("step 6 | valid") == 1
    assert "2 process(es)" in log
    assert "effective batch size 4" in log
    found, expected = read_metrics(two), read_metrics(one)
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]

    stacked = [(a, b) for a, b in zip(found, expected, strict=True) if a["step"] <= 4]
    for a, b in stacked:
        for name in ("loss", "accuracy", "mIoU", "pixel_accuracy"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-5)
    later = [a["loss"] - b["loss"] for a, b in zip(found, expected, strict=True) if a["step"] > 4]
    assert max(map(abs, later)) < 0.05  # a few iterations over half a batch, or over the whole
    assert all(math.isfinite(r["loss"]) for r in found)
    a, b = load(two / WEIGHTS), load(one / WEIGHTS)
    assert a.keys() == b.keys()
    assert load(two / CHECKPOINT)["step"] == 6


@pytest.mark.slow
def test_weights_and_statistics_under_torchrun(tmp_path):
    """At the end of the stacked phase."""
    more = [*SURE, "TRAIN.PRETRAIN_STEPS", "100"]
    done = torchrun("seg_train", *scenes(tmp_path / "two", 2, *more))
    assert done.returncode == 0, done.stderr
    assert run_tool("seg_train", *scenes(tmp_path / "one", 4, *more)) == 0
    two, one = (load(run_of(tmp_path / name) / WEIGHTS) for name in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


# seg_train, stopped after the fifth step.
STOPPER = """
import sys
from lib.experiment import Run
from mdeq_vision.command import seg_train

real = Run.record

def record(self, kind, step, **values):
    real(self, kind, step, **values)
    if kind == "train" and step == 5:
        raise SystemExit(3)

Run.record = record
sys.exit(seg_train())
"""


@pytest.mark.slow
def test_resumed_under_torchrun(tmp_path, monkeypatch):
    """Bit for bit, dropout and the Jacobian loss included: every process goes on drawing."""
    more = ["TRAIN.END_EPOCH", "2"]
    done = torchrun("seg_train", *scenes(tmp_path / "whole", 2, *more))
    assert done.returncode == 0, done.stderr
    stopper = tmp_path / "stop.py"
    stopper.write_text(STOPPER)
    assert torchrun(stopper, *scenes(tmp_path / "stopped", 2, *more)).returncode != 0
    assert load(run_of(tmp_path / "stopped") / CHECKPOINT)["step"] == 4
    done = torchrun("seg_train", *scenes(tmp_path / "stopped", 2, *more, "TRAIN.RESUME", "True"))
    assert done.returncode == 0, done.stderr
    found, expected = (
        [
            {k: v for k, v in r.items() if k != "images_per_s"}
            for r in read_metrics(run_of(tmp_path / name))
        ]
        for name in ("stopped", "whole")
    )
    assert found == expected
    a, b = (load(run_of(tmp_path / name) / CHECKPOINT) for name in ("stopped", "whole"))
    assert [k for k, v in b["state_dict"].items() if not torch.equal(a["state_dict"][k], v)] == []


# ---- refused under torchrun ---------------------------------------------------------------------


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read(tmp_path):
    """The other one waits for it, but not for ever."""
    write_cityscapes(tmp_path / "data", size=(64, 32))
    (path,) = (tmp_path / "data/cityscapes/leftImg8bit/train").rglob("aachen_000002*.png")
    path.write_bytes(path.read_bytes()[:200])
    more = f"""
        DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 DATASET.ROOT {tmp_path}/data
        DATASET.TRAIN_SET list/cityscapes/train.lst DATASET.TEST_SET list/cityscapes/val.lst
        TRAIN.SHUFFLE False TRAIN.BASE_SIZE 64 PERCENT 1
    """.split()
    done = torchrun("seg_train", *scenes(tmp_path / "out", 2, *more))
    assert done.returncode != 0
    assert f"seg_train.py: image {path} cannot be read" in done.stderr
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "argv", "named"),
    [
        ("cls_train", ["--cfg", DIGITS, *TINY_DIGITS], "without torchrun"),
        ("seg_train", ["--cfg", SCENES, "MODEL.PRETRAINED", "no.pth"], "no file no.pth"),
        ("seg_train", ["--cfg", SCENES, "TRAIN.LR", "fast"], "TRAIN.LR"),
        ("seg_train", ["--cfg", SCENES, "TRAIN.BATCH_SIZE_PER_GPU", "501"], "fewer than one batch"),
        ("seg_test", ["--cfg", SCENES, "TEST.MODEL_FILE", "no.pt"], "no file no.pt"),
    ],
)
def test_refused_in_both_processes(tmp_path, tool, argv, named):
    done = torchrun(tool, *argv, "--modelDir", tmp_path / "out")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{tool}.py: ")]
    assert lines
    assert all(named in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_existing_run_is_refused_in_both_processes(tmp_path):
    assert run_tool("seg_train", *scenes(tmp_path, 4)) == 0
    before = {p: p.read_bytes() for p in run_of(tmp_path).iterdir()}
    done = torchrun("seg_train", *scenes(tmp_path, 2))
    assert done.returncode != 0
    assert "already holds a run" in done.stderr
    assert {p: p.read_bytes() for p in run_of(tmp_path).iterdir()} == before


# ---- evaluation under torchrun ------------------------------------------------------------------


@pytest.mark.slow
def test_seg_test_under_torchrun(tmp_path, capsys):
    """Every image once, from one process or the other, and the figures of one process."""
    assert run_tool("seg_train", *scenes(tmp_path, 4)) == 0
    more = ["TEST.NUM_SAMPLES", "7", "TEST.BATCH_SIZE_PER_GPU", "1"]
    done = torchrun("seg_test", *scenes(tmp_path, 4, *more))
    assert done.returncode == 0, done.stderr
    folder = run_of(tmp_path) / "predictions"
    two = {p.name: p.read_bytes() for p in (folder / "labels").iterdir()}
    assert sorted(two) == [f"test_{i:04d}.png" for i in range(7)]
    capsys.readouterr()
    assert run_tool("seg_test", *scenes(tmp_path, 4, *more)) == 0
    (one,) = re.findall(r"mIoU [\d.]+%.*mean_accuracy [\d.]+%", capsys.readouterr().out)
    assert done.stdout.count(one) == 1
    assert {p.name: p.read_bytes() for p in (folder / "labels").iterdir()} == two
    with Image.open(folder / "labels" / "test_0000.png") as image:
        assert image.size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(
            1,
            marks=pytest.mark.xfail(
                strict=True,
                reason="_Totals.reduce: a process without images has two sums, the others four",
            ),
        ),
        5,
    ],
)
def test_cls_valid_under_torchrun(tmp_path, capsys, count):
    """Also where there are fewer images than processes."""
    argv = ["--cfg", DIGITS, "--modelDir", tmp_path, *TINY_DIGITS, "WORKERS", "0"]
    argv += ["TEST.BATCH_SIZE_PER_GPU", "2"]
    assert run_tool("cls_train", *argv) == 0
    argv += ["TEST.NUM_SAMPLES", count]
    capsys.readouterr()
    assert run_tool("cls_valid", *argv) == 0
    (one,) = re.findall(r"top1 [\d.]+% top5 [\d.]+%", capsys.readouterr().out)
    done = torchrun("cls_valid", *argv, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(one) == 1


# ---- as a script --------------------------------------------------------------------------------


def print_differences():
    with tempfile.TemporaryDirectory() as folder:
        two, one = run_two(Path(folder), CASES), all_cases(Processes(), CASES)
    print("case | phase | batch norm | loss | gradient | state")
    for key, expected in one.items():
        parts = [largest(found["steps"][key], expected) for found in two]
        worst = {name: max(part[name] for part in parts) for name in parts[0]}
        print(" | ".join([*key, *(f"{value:.1e}" for value in worst.values())]))


if __name__ == "__main__":
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    if len(sys.argv) > 1:
        work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    else:
        print_differences()
