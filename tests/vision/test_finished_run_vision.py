"""scripts/evaluations.py of image models, on real runs."""

import json

import pytest

import gradient_errors
from evaluations import main
from small_digits import digits, quick  # noqa: F401  (fixtures)
from small_runs import SCENES, TINY_SCENES, run_tool


def evaluated(folder, *flags):
    assert main([str(folder), "--batches", "2", *flags]) == 0
    return json.loads((folder / "evaluations.json").read_text())


def test_a_classifier(digits, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gradient_errors, "LONGEST", 8)  # f of so short a run hardly settles
    folder = digits("DEQ.F_START", "learned", "TRAIN.BATCH_CHUNK", 2)
    capsys.readouterr()
    found = evaluated(folder)
    text = capsys.readouterr().out
    assert text.startswith("solver broyden, gradient ift, 2 batches of the training data")
    assert text.splitlines()[-1] == str(folder / "evaluations.json")
    assert [row["threshold"] for row in found["rows"]] == [1, 2, 3, 4, 6, 8]
    assert found["own"] == 4
    assert found["rows"][3]["evaluations"] == 5  # broyden makes one more
    assert found["products"] > 0
    assert found["residual"] > 1e-6
    assert "No hint: the exact solves ended at" in text
    assert main([str(folder), "--batches", "1000", "--out", str(folder / "b.json")]) == 2
    assert "batches, but 1000 are asked for" in capsys.readouterr().err
    assert not (folder / "b.json").exists()


@pytest.mark.slow  # like the classifier
def test_a_segmentation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_errors, "LONGEST", 20)
    argv = ["--cfg", SCENES, "--modelDir", tmp_path, *TINY_SCENES, "WORKERS", 0]
    assert run_tool("seg_train", *argv) == 0
    folder = tmp_path / "digit_scenes" / SCENES.stem
    found = evaluated(folder)
    assert (found["own"], found["batches"]) == (4, 2)
    assert "4*" in capsys.readouterr().out
