"""The commands in two processes under torchrun, on the CPU."""

import math
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image

from image_files import write_cityscapes
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, read_metrics
from small_runs import DIGITS, ROOM, SCENES, TINY, TINY_DIGITS, run_tool

# So few iterations do not converge; and every case starts three processes.
pytestmark = [pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning"), pytest.mark.slow]

STAGE = "MODEL.EXTRA.FULL_STAGE"
# Two epochs of three steps, the border after the fourth; what a step draws is switched off.
SHORT = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.BIG_KERNELS [0,0] {STAGE}.HEAD_CHANNELS [4,4] WORKERS 0
""".split()
SHORT_SCENES = [*TINY, *"TRAIN.IMAGE_SIZE [32,32] PERCENT 0.0122".split(), *SHORT]
SURE = "MODEL.DROPOUT 0 LOSS.JAC_LOSS_FREQ 0 TRAIN.OPTIMIZER sgd TRAIN.LR 0.01".split()


def torchrun(tool, *argv):
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
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def scenes(folder, each, *more):
    argv = ["--cfg", SCENES, "--modelDir", folder, *SHORT_SCENES]
    return [*argv, "TRAIN.BATCH_SIZE_PER_GPU", each, *map(str, more)]


def run_of(folder):
    return folder / "digit_scenes" / SCENES.stem


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

    assert found.pop() == expected.pop()  # the summary
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


def test_weights_and_statistics_under_torchrun(tmp_path):
    """At the end of the stacked phase."""
    more = [*SURE, "TRAIN.PRETRAIN_STEPS", "100"]
    done = torchrun("seg_train", *scenes(tmp_path / "two", 2, *more))
    assert done.returncode == 0, done.stderr
    assert run_tool("seg_train", *scenes(tmp_path / "one", 4, *more)) == 0
    two, one = (load(run_of(tmp_path / name) / WEIGHTS) for name in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


def test_an_extra_stage_under_torchrun(tmp_path):
    """Two processes and one take the same steps over both lists."""
    city = write_cityscapes(tmp_path / "city", n_train=5, n_val=4, size=(64, 32))
    more = f"""
        DATASET.DATASET cityscapes DATASET.ROOT {city} DATASET.NUM_CLASSES 19 PERCENT 1
        DATASET.TRAIN_SET list/cityscapes/train.lst DATASET.TEST_SET list/cityscapes/val.lst
        DATASET.EXTRA_TRAIN_SET list/cityscapes/trainval.lst TRAIN.EXTRA_EPOCH 2
        TRAIN.END_EPOCH 1 TRAIN.PRETRAIN_STEPS 100 TRAIN.BASE_SIZE 64 TEST.IMAGE_SIZE [64,32]
        TEST.BASE_SIZE 64 TEST.BATCH_SIZE_PER_GPU 2
    """.split()
    done = torchrun("seg_train", *scenes(tmp_path / "two", 2, *SURE, *more))
    assert done.returncode == 0, done.stderr
    assert run_tool("seg_train", *scenes(tmp_path / "one", 4, *SURE, *more)) == 0
    two, one = (tmp_path / name / "cityscapes" / SCENES.stem for name in ("two", "one"))
    found, expected = (
        [(r["step"], r["lr"], r["loss"]) for r in read_metrics(f) if r["kind"] == "train"]
        for f in (two, one)
    )
    assert [r[0] for r in found] == [1, 2, 3, 4, 5]
    assert found == [pytest.approx(r, abs=1e-5) for r in expected]
    one, two = load(one / WEIGHTS), load(two / WEIGHTS)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


# seg_train, stopped after the fifth step.
STOPPER = """
import sys
from lib.runs.run_folder import Run
from mdeq_vision.command import seg_train

real = Run.record

def record(self, kind, step, **values):
    real(self, kind, step, **values)
    if kind == "train" and step == 5:
        raise SystemExit(3)

Run.record = record
sys.exit(seg_train())
"""


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
            {k: v for k, v in r.items() if not k.endswith(("_per_s", "_mib"))}
            for r in read_metrics(run_of(tmp_path / name))
        ]
        for name in ("stopped", "whole")
    )
    assert found == expected
    a, b = (load(run_of(tmp_path / name) / CHECKPOINT) for name in ("stopped", "whole"))
    assert [k for k, v in b["state_dict"].items() if not torch.equal(a["state_dict"][k], v)] == []


# ---- refused under torchrun ---------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("tool", "argv", "named"),
    [
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


def test_an_existing_run_is_refused_in_both_processes(tmp_path):
    assert run_tool("seg_train", *scenes(tmp_path, 4)) == 0
    before = {p: p.read_bytes() for p in run_of(tmp_path).iterdir()}
    done = torchrun("seg_train", *scenes(tmp_path, 2))
    assert done.returncode != 0
    assert "already holds a run" in done.stderr
    assert {p: p.read_bytes() for p in run_of(tmp_path).iterdir()} == before


# ---- evaluation under torchrun ------------------------------------------------------------------


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


@pytest.mark.parametrize("count", [1, 5])
def test_cls_valid_under_torchrun(tmp_path, capsys, count):
    """Also where there are fewer images than processes."""
    argv = ["--cfg", DIGITS, "--modelDir", tmp_path, *TINY_DIGITS, "WORKERS", "0"]
    argv += ["TEST.BATCH_SIZE_PER_GPU", "2"]
    assert run_tool("cls_train", *argv) == 0
    argv += ["TEST.NUM_SAMPLES", count]
    capsys.readouterr()
    assert run_tool("cls_valid", *argv) == 0
    (one,) = re.findall(r"top1 [\d.]+% top5 [\d.]+%", capsys.readouterr().out)
    done = torchrun("cls_valid", *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(one) == 1
