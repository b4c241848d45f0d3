"""Fixtures for runs of a second: a classifier of digits. Import them by name."""

import pytest
import torch

from lib.runs.run_folder import read_metrics
from mdeq_vision import command
from mdeq_vision.datasets import digit_scenes
from small_runs import DIGITS, TINY_DIGITS, run_tool

STAGE = "MODEL.EXTRA.FULL_STAGE"
# Two epochs of three steps, the border after the fourth.
SMALL = f"""
    {STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.NUM_BRANCHES 2 {STAGE}.BIG_KERNELS [0,0] WORKERS 0 SAVE_FREQ 0
""".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """What takes most of the time of such a short run, and is tested elsewhere, is left out."""
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})
    if "summary" not in request.node.name:
        monkeypatch.setattr(command, "model_summary", lambda *arguments: "")


@pytest.fixture
def digits(tmp_path):
    """Train a classifier: ``digits(*overrides)`` -> its folder; ``.argv`` makes the arguments."""

    def train(*more):
        assert run_tool("cls_train", *argv(*more)) == 0
        return folder

    def argv(*more):
        places = ["--cfg", str(DIGITS), "--modelDir", str(tmp_path)]
        return [*places, *TINY_DIGITS, *SMALL, *map(str, more)]

    folder = tmp_path / "digits" / DIGITS.stem
    train.argv, train.folder = argv, folder
    return train


def of_kind(folder, kind):
    return [r for r in read_metrics(folder) if r["kind"] == kind]


def state_of(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
