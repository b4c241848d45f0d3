"""The audit of image models, through scripts/audit.py."""

import json

import pytest
import torch

from audit import main
from lib.runs.run_folder import read_metrics
from mdeq_vision import audits
from small_digits import digits, quick  # noqa: F401  (fixtures)
from small_runs import SCENES, TINY_SCENES, run_tool

FULL = ["TEST.NUM_SAMPLES", 0]


def audited(folder, samples):
    assert main([str(folder), "--samples", str(samples)]) == 0
    return json.loads((folder / "audit.json").read_text())


def own(found):
    return next(cut for cut in found["cuts"] if cut["name"] == "own threshold")


def test_a_classifier(digits, capsys):  # noqa: F811
    folder = digits()
    found = audited(folder, 8)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "audit.json")
    assert (found["samples"], found["threshold"], found["measure"]) == (8, 4, "accuracy")
    tested = [r for r in read_metrics(folder) if r["kind"] == "final_test"][-1]
    assert own(found)["measure"] == pytest.approx(tested["top1"])  # of the same eight images


@pytest.mark.slow  # like the classifier
def test_a_segmentation(tmp_path, capsys):
    argv = ["--cfg", SCENES, "--modelDir", tmp_path, *TINY_SCENES, "WORKERS", 0]
    assert run_tool("seg_train", *argv) == 0
    folder = tmp_path / "digit_scenes" / SCENES.stem
    found = audited(folder, 8)
    assert (found["samples"], found["measure"]) == (8, "pixel accuracy")
    tested = [r for r in read_metrics(folder) if r["kind"] == "final_test"][-1]
    assert own(found)["measure"] == pytest.approx(tested["pixel_accuracy"], rel=1e-5)
    assert found["effort"]["said"] == "cannot be told from 8 samples"


def test_entropy():
    p = torch.full((2, 4, 3, 3), 0.25)
    p[1] = 0
    p[1, 2] = 1
    for part in (p, p[:, :, 0, 0]):
        assert audits._entropy(part).tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0])
