"""mdeq_vision.load: trained models in one line, from a run and from a file."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import export_weights
import mdeq_vision
from lib.errors import InputError
from lib.runs.model_file import read_model_file
from lib.runs.processes import Processes
from mdeq_vision.classes_file import CLASSES, as_text
from mdeq_vision.command import CONFIG
from mdeq_vision.config import config, update_config
from mdeq_vision.datasets import DIGIT_SCENES, digit_scenes, get_cls_dataset, get_seg_dataset
from mdeq_vision.datasets.digits import split_digits
from mdeq_vision.evaluation import evaluate_segmentation
from mdeq_vision.model import MDEQClsNet, MDEQSegNet
from mdeq_vision.prediction.predictors import to_picture
from mdeq_vision.trained import build, of_run
from small_digits import SMALL, digits, quick  # noqa: F401
from small_runs import DIGITS, ROOM, SCENES

MODELS = ROOM.parent / "docs/models"
CPU = torch.device("cpu")
OWN = [
    {"name": "sky", "colour": [10, 20, 30], "label": 7},
    {"name": "café", "colour": [200, 0, 0], "label": 300},
]


@pytest.fixture(scope="module")
def of_digits():
    return mdeq_vision.load(MODELS / "digits.safetensors")


@pytest.fixture(scope="module")
def of_scenes():
    return mdeq_vision.load(MODELS / "scenes.safetensors", "cpu")


def made_run(folder, file, *more, classes=None):
    """A run's folder as training leaves it, with initial weights, without data."""
    cfg = config.clone()
    update_config(cfg, Namespace(cfg=file, opts=[*SMALL, *map(str, more)]))
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(cfg.dump())
    model = (MDEQClsNet if file == DIGITS else MDEQSegNet)(cfg)
    torch.save(model.state_dict(), folder / "model.pt")
    if classes is not None:
        (folder / CLASSES).write_text(as_text(classes))
    return folder


def test_what_is_loaded(of_digits, of_scenes):
    assert of_digits.classes == list("0123456789")
    assert not of_digits.model.training
    assert of_digits.settings.MODEL.IMAGE_SIZE == [16, 16]
    assert of_digits.figures["final_test"]["top1"] > 0.97
    assert of_scenes.classes[:3] == ["background", "0", "1"]
    assert of_scenes.facts.palette == DIGIT_SCENES.palette
    assert of_scenes.facts.std == DIGIT_SCENES.std
    assert of_scenes.figures["final_test"]["mIoU"] > 0.7


def test_digits_are_classified_as_in_an_evaluation(of_digits):
    test = get_cls_dataset(of_digits.settings, "test")
    images = torch.tensor(split_digits()["test"].images[:12])[:, None]  # (12, 1, 8, 8)
    found = of_digits.classify(images)
    with torch.no_grad():
        for i, one in enumerate(found):
            expected = of_digits.model(test[i][0][None])[0][0].softmax(0)
            assert (one.probabilities - expected).abs().max() < 0.02  # pixels of 8 bits
            assert 1 <= one.evaluations <= of_digits.settings.DEQ.F_THRES + 1
            assert 0 < one.residual < 1e-2
    hits = [one.best(1)[0][0] == str(test.labels[i]) for i, one in enumerate(found)]
    assert np.mean(hits) > 0.9
    best = found[0].best(3)
    assert [p for _, p in best] == sorted(found[0].probabilities.tolist())[::-1][:3]


def test_each_picture_is_solved_by_itself(of_digits):
    images = torch.tensor(split_digits()["test"].images[:6])[:, None]
    together = of_digits.classify(images)
    alone = [of_digits.classify(image) for image in images]
    assert [a.evaluations for a in alone] == [b.evaluations for b in together]
    assert len({a.evaluations for a in alone}) > 1
    assert all(
        torch.equal(a.probabilities, b.probabilities) for a, b in zip(alone, together, strict=True)
    )


def test_paths_images_and_tensors(of_digits, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
    image = Image.fromarray(grey)
    image.save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), image, torch.from_numpy(grey)]
    forms += [torch.from_numpy(grey)[None].expand(3, -1, -1), torch.from_numpy(grey) / 255]
    first, *others = of_digits.classify(forms)
    assert all(torch.equal(first.probabilities, other.probabilities) for other in others)
    assert torch.equal(of_digits.classify(image).probabilities, first.probabilities)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 5, 5), torch.full((3, 4, 4), 1.5), torch.zeros(3, 4, 4).long(), b"x"]
)
def test_other_forms_are_refused(wrong):
    with pytest.raises(InputError, match=r"a picture is a path, |a tensor of pixels is uint8"):
        to_picture(wrong)


@pytest.mark.parametrize("test", [{}, {"IMAGE_SIZE": [64, 40], "BASE_SIZE": 72, "FLIP_TEST": True}])
def test_scenes_are_segmented_as_by_seg_test(of_scenes, monkeypatch, test):
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 1, "test": 1, "valid": 1})
    cfg = of_scenes.settings.clone()
    cfg.defrost()
    cfg.TRAIN.IMAGE_SIZE, cfg.TEST.BATCH_SIZE_PER_GPU = [64, 48], 1
    cfg.TEST.update(test)
    model = replace(of_scenes, settings=cfg)
    dataset, expected = get_seg_dataset(cfg, "test"), {}
    options = {"device": CPU, "processes": Processes(), "on_prediction": expected.__setitem__}
    evaluation = evaluate_segmentation(cfg, model.model, dataset, **options)
    found = model.segment(Image.fromarray(dataset.picture(0)))
    assert np.array_equal(found.labels, expected[0].numpy())
    assert found.confidence.shape == found.labels.shape == (48, 64)
    assert 1 / 11 <= found.confidence.min() <= found.confidence.max() <= 1
    assert sum(found.shares.values()) == pytest.approx(1)
    assert next(iter(found.shares)) == "background"
    assert found.solves == (8 if test else 1)  # four windows, and their mirror images
    assert found.evaluations / found.solves == pytest.approx(evaluation.figures["nfe"])
    assert found.residual >= evaluation.figures["rel_residual"] * (1 - 1e-6)


def test_a_run_and_its_file_are_the_same_model(digits, tmp_path, capsys):  # noqa: F811
    folder = digits()
    assert json.loads((folder / CLASSES).read_text()) == [{"name": str(d)} for d in range(10)]
    run = mdeq_vision.load(folder)
    target = tmp_path / "model.safetensors"
    assert export_weights.main([str(folder), str(target)]) == 0
    file = mdeq_vision.load(target)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9), dtype=np.uint8))
    one, other = (model.classify(picture) for model in (run, file))
    assert torch.equal(one.probabilities, other.probabilities)
    assert file.figures == run.figures
    assert file.classes == run.classes
    for written in (target, tmp_path / "model.md"):
        assert str(tmp_path).encode() not in written.read_bytes()  # no places on this machine
    (folder / CLASSES).unlink()  # an older run
    assert mdeq_vision.load(folder).classes == run.classes


def test_a_card_leaves_out_what_is_not_finite(tmp_path):
    """A mean IoU without any class is null in the records."""
    sizes = ("DATASET.DATASET", "own_scenes", "DATASET.NUM_CLASSES", 2)
    folder = made_run(tmp_path / "run", SCENES, *sizes, classes=OWN)
    record = {"kind": "final_test", "step": 1, "mIoU": None, "pixel_accuracy": 0.5, "nfe": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record | {"rel_residual": None}))
    assert export_weights.main([str(folder), str(tmp_path / "model.safetensors")]) == 0
    card = (tmp_path / "model.md").read_text()
    assert "| pixel accuracy (test) | 50.00 % |\n| evaluations of f (test) | 9.0 |\n\n" in card
    assert "nan" not in card
    assert "IoU" not in card


def test_classes_of_ones_own(tmp_path):
    sizes = ("DATASET.DATASET", "own_scenes", "DATASET.NUM_CLASSES", 2)
    folder = made_run(tmp_path / "run", SCENES, *sizes, classes=OWN)
    model = mdeq_vision.load(folder)
    assert model.classes == ["sky", "café"]
    assert model.facts.palette == ((10, 20, 30), (200, 0, 0))
    assert model.facts.label_ids == (7, 300)
    assert set(model.segment(Image.new("RGB", (20, 10))).shares) <= {"sky", "café"}
    (folder / CLASSES).unlink()
    with pytest.raises(InputError, match=r"classes\.json is missing, and the data of the run"):
        mdeq_vision.load(folder)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '[{"name": 3}]', '[{"name": "a"}]', "[" * 100_000]
)
def test_damaged_classes_are_refused(tmp_path, text):
    folder = made_run(tmp_path / "run", SCENES, classes=OWN)
    (folder / CLASSES).write_text(text)
    with pytest.raises(InputError, match=r"classes\.json is no list of classes"):
        of_run(folder)


def test_outputs_beyond_the_classes_are_numbered(tmp_path):
    classes = [{"name": "zero"}, {"name": "one"}]
    model = mdeq_vision.load(made_run(tmp_path / "run", DIGITS, classes=classes))
    names = {name for name, _ in model.classify(Image.new("L", (8, 8))).best(10)}
    assert names == {"zero", "one", *(f"output {i}" for i in range(2, 10))}


def test_what_cannot_be_loaded(tmp_path):
    file = MODELS / "digits.safetensors"
    found = read_model_file(file, "", of_run)
    for settings in (
        found.settings | {"CLASSES": OWN},
        found.settings | {"CLASSES": 3},
        found.settings | {"CLASSES": [{"name": str(i)} for i in range(11)]},
    ):
        with pytest.raises(InputError, match="damaged: its classes do not fit its settings"):
            build(replace(found, settings=settings), CPU)
    with pytest.raises(InputError, match=r"unknown key TRIAN in .*digits\.safetensors"):
        build(replace(found, settings=found.settings | {"TRIAN": {}}), CPU)
    with pytest.raises(InputError, match=r"words\.safetensors is for language model, not for imag"):
        mdeq_vision.load(MODELS / "words.safetensors")
    with pytest.raises(InputError, match=r"holds no run of MDEQ-Vision: config\.yaml is missing"):
        mdeq_vision.load(tmp_path)
    for device in ("cuda:77", "nonsense"):
        with pytest.raises(InputError, match=f"the device {device} cannot be used here"):
            mdeq_vision.load(file, device)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        mdeq_vision.load(tmp_path / "broken.safetensors")
