"""What TensorBoard shows of an image model: predictions at each validation, the curves."""

import io
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from events import pictures
from lib.runs.run_folder import Run
from mdeq_vision import events
from mdeq_vision.class_predictions import Prediction
from mdeq_vision.command import load_config
from mdeq_vision.datasets import get_seg_dataset
from mdeq_vision.events import ImageEvents
from small_digits import digits, of_kind, quick  # noqa: F401  (fixtures)
from small_runs import SCENES, TINY_SCENES, run_tool


def steps_of(found, tag):
    return [step for name, step, _ in found if name == tag]


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.slow
def test_each_validation_has_predictions(digits, monkeypatch):  # noqa: F811
    """And a run without them is the same."""
    monkeypatch.setattr(events, "_PAUSE", 0.0)
    folder = digits()
    steps = [r["step"] for r in of_kind(folder, "valid")]
    assert len(steps) > 1
    found = pictures(folder)
    assert steps_of(found, "predictions") == steps_of(found, "curves") == steps
    first = opened(found[0][2])
    assert first.shape == (8 + 4, 8 * (8 + 4 + 2), 3)  # eight images, frames and gaps
    frames = {tuple(first[0, x]) for x in range(0, first.shape[1], 14)}
    assert frames <= {events._RIGHT, events._WRONG}
    losses = [r["loss"] for r in of_kind(folder, "train")]
    monkeypatch.setattr(ImageEvents, "after_validation", lambda *args: None)
    other = folder.with_name("other")
    folder.rename(other)
    assert [r["loss"] for r in of_kind(digits(), "train")] == losses


def test_frames_say_what_is_right():
    images = [(torch.zeros(3, 6, 6), 4), (torch.ones(3, 6, 6), 5)]
    found = [(Prediction(0, 4, 4, 0.9),), (Prediction(1, 5, 6, 0.4),)]
    tiles = events._tiles(images, found)
    assert tuple(tiles[0, 0]) == events._RIGHT
    assert tuple(tiles[0, 12]) == events._WRONG
    assert (tiles[2:8, 2:8] == 0).all()


@pytest.mark.slow
def test_a_run_of_scenes_shows_overlays(tmp_path):
    assert run_tool("seg_train", "--cfg", SCENES, "--modelDir", tmp_path, *TINY_SCENES) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("metrics.jsonl"))
    found = pictures(folder)
    assert steps_of(found, "predictions") == [r["step"] for r in of_kind(folder, "valid")]
    assert opened(found[0][2]).shape[0] == 2 * 32  # a scene above its overlay


def test_scenes_stand_above_their_overlays(tmp_path, monkeypatch):
    """At most eight; the curves come once half a minute has passed."""
    cfg = load_config(Namespace(cfg=SCENES, opts=["TRAIN.IMAGE_SIZE", "[32,32]"]))
    scenes = get_seg_dataset(cfg, "valid")
    shown, run = ImageEvents(), Run(tmp_path, ("config.yaml", ""), quiet=True)
    run.record("valid", 1, phase="stacked", mIoU=0.5)
    for step in (1, 2):
        shown.begin()
        for index in range(9 if step == 1 else 1):
            shown.keep(index, torch.full((32, 32), 3))
        shown.after_validation(run, step, 1, scenes, "mIoU")
        monkeypatch.setattr(events, "_PAUSE", 0.0)
    run.close()
    found = pictures(tmp_path)
    assert [entry[:2] for entry in found] == [("predictions", 1), ("predictions", 2), ("curves", 2)]
    drawn = [opened(png) for _, _, png in found]
    assert drawn[0].shape == (2 * 32, 8 * (32 + 2), 3)
    scene = scenes.picture(0)
    assert (drawn[1][:32, :32] == scene).all()
    mixed = (scene.astype(float) + np.asarray(scenes.facts.palette[3])) / 2
    assert np.abs(drawn[1][32:, :32] - mixed).max() <= 0.5


@pytest.mark.parametrize(("size", "shown"), [((64, 64), (64, 64)), ((1024, 2048), (128, 256))])
def test_large_pictures_shrink(size, shown):
    assert events._smaller(np.zeros((*size, 3), np.uint8)).shape[:2] == shown
