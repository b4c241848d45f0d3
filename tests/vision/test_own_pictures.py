"""Pictures of the user's own, a folder per class: their names in the log and in predictions."""

import csv

import pytest

from image_files import settings, write_imagenet
from lib.errors import InputError
from mdeq_vision.class_predictions import Prediction, class_table, write_predictions
from mdeq_vision.datasets import get_cls_dataset
from small_digits import SMALL, of_kind, quick  # noqa: F401
from small_runs import ROOM, TINY, run_tool

OWN = ROOM / "experiments/own/cls_mdeq_TINY.yaml"


@pytest.fixture
def root(tmp_path):
    """Three classes whose names have blanks, letters beyond ASCII, and a comma."""
    images = write_imagenet(tmp_path / "data", classes=3, per_class=4, size=(20, 16)) / "images"
    for split in ("train", "val"):
        for number, name in enumerate(("café au lait", "a, b", "Zebra")):
            (images / split / f"n{1440764 + number:08d}").rename(images / split / name)
    return images


def test_train_and_predict(root, tmp_path, capsys):
    argv = ["--cfg", OWN, "--modelDir", tmp_path / "out", *TINY, *SMALL]
    argv += ["DATASET.ROOT", root, "MODEL.IMAGE_SIZE", "[8,8]", "TRAIN.END_EPOCH", 2]
    argv += ["TEST.NUM_SAMPLES", 0, "TEST.BATCH_SIZE_PER_GPU", 5]
    assert run_tool("cls_train", *argv) == 0
    folder = tmp_path / "out/own_pictures" / OWN.stem
    assert "\nclasses: Zebra, a, b, café au lait\n" in (folder / "log.txt").read_text()
    capsys.readouterr()
    assert run_tool("cls_valid", *argv) == 0
    out = capsys.readouterr().out.splitlines()
    table = {line[:12].rstrip(): line[12:].split() for line in out if "  of 4" in line}
    assert list(table) == ["Zebra", "a, b", "café au lait"]
    file = folder / "predictions/classes.csv"
    assert out[-1] == f"predictions in {file}"
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 12
    for name, (percent, *_) in table.items():
        of_class = [row for row in rows if row["class"] == name]
        assert all(row["image"].startswith(f"{name}/") for row in of_class)
        right = sum(row["predicted"] == name for row in of_class)
        assert float(percent) == 25 * right
    (valid,) = (r for r in of_kind(folder, "valid") if r["phase"] == "equilibrium")
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert right / 12 == pytest.approx(valid["top1"])
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    assert not any(line.startswith("note: DATASET.CLASSES") for line in out)
    # Another name, another order: the outputs would get wrong names.
    for split in ("train", "val"):
        (root / split / "Zebra").rename(root / split / "zebra")
    assert run_tool("cls_valid", *argv) == 2
    expected = "class 0 of own_pictures is 'a, b', but the model was trained with 'Zebra' there"
    assert expected in capsys.readouterr().err
    assert run_tool("cls_valid", *argv, "DATASET.CLASSES", "[]") == 0
    assert "note: DATASET.CLASSES is [] in this evaluation" in capsys.readouterr().out


def test_debug_writes_no_predictions(root, tmp_path):
    argv = ["--cfg", OWN, "--modelDir", tmp_path / "out", *TINY, *SMALL, "DATASET.ROOT", root]
    assert run_tool("cls_train", *argv, "TRAIN.END_EPOCH", 1) == 0
    folder = tmp_path / "out/own_pictures" / OWN.stem
    assert run_tool("cls_valid", *argv, "DEBUG.DEBUG", True) == 0
    assert not (folder / "predictions").exists()


def test_predictions_beyond_the_classes(tmp_path):
    """Of a network with more outputs, and in any order."""
    found = [Prediction(1, 1, 1, 0.5), Prediction(0, 0, 7, 0.9)]
    write_predictions(tmp_path / "new/classes.csv", found, ["a", "b"], ["x.png", "y.png"])
    lines = (tmp_path / "new/classes.csv").read_text().splitlines()
    assert lines[1:] == ["x.png,a,output 7,0.9000", "y.png,b,b,0.5000"]
    table = class_table(found, ["a", "b", "long name"]).splitlines()
    assert table == ["a            0.00  of 1", "b          100.00  of 1", "long name       -"]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"IMAGE_SIZE": [8, 8], "NUM_CLASSES": 2}, "but own_pictures has 3 classes: set it to 3"),
        ({"IMAGE_SIZE": [8, 6], "NUM_CLASSES": 3}, "but own_pictures's are square"),
    ],
)
def test_settings_that_do_not_fit(root, model, named):
    with pytest.raises(InputError, match=named):
        get_cls_dataset(settings("own_pictures", root, MODEL=model), "train")


def test_folders_that_differ(root):
    (root / "val/Zebra").rename(root / "val/zebra")
    model = {"IMAGE_SIZE": [8, 8], "NUM_CLASSES": 3}
    with pytest.raises(InputError, match="must have the same class folders, but Zebra is in one"):
        get_cls_dataset(settings("own_pictures", root, MODEL=model), "train")
