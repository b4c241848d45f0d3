"""Input to the image tools that looks bad and is not."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import refusals
from image_files import noise
from lib.runs.checkpoint import load
from lib.runs.run_folder import LOG, WEIGHTS, read_metrics
from mdeq_vision.datasets.cityscapes_lists import write_lists
from refusals import contents
from small_runs import run_tool

finished, place, quick = refusals.finished, refusals.place, refusals.quick  # fixtures
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_refused_for_its_data_can_begin_again(place, workers):
    """With TRAIN.RESUME, whether it made a step or none."""
    argv = place.imagenet("WORKERS", str(workers), "TRAIN.END_EPOCH", "1")
    path = place.file("*_1.JPEG")
    content = path.read_bytes()
    place.cut(path)
    assert run_tool("cls_train", *argv) == 2
    path.write_bytes(content)
    assert run_tool("cls_train", *argv, "TRAIN.RESUME", "True") == 0


# ---- what looks bad and is not ------------------------------------------------------------------


def converted(path: Path, mode: str, suffix: str | None = None) -> Path:
    image = Image.open(path).convert(mode)
    path.unlink()
    path = path.with_suffix(suffix or path.suffix)
    image.save(path)
    return path


def test_grey_palette_and_transparent_images_are_accepted(place):
    argv = place.imagenet("TRAIN.END_EPOCH", "1")
    for pattern in ("*_0.JPEG", "ILSVRC*0000.JPEG"):
        converted(place.file(pattern), "L")
        for mode in ("RGBA", "P", "CMYK"):
            path = place.file(pattern.replace("0.", "1."))
            other = path.with_stem(f"{path.stem}_{mode}")
            shutil.copy(path, other)
            converted(other, mode, ".jpeg" if mode == "CMYK" else ".png")
    assert run_tool("cls_train", *argv) == 0
    assert (
        "9 training and 9 validation images"
        in (place.output / "imagenet/cls_mdeq_TINY" / LOG).read_text()
    )


def test_grey_and_transparent_scenes_are_accepted(place):
    argv = place.cityscapes("TRAIN.END_EPOCH", "1")
    images = sorted((place.data / "cityscapes/leftImg8bit").rglob("*.png"))
    for i, path in enumerate(images):
        converted(path, ("L", "RGBA", "LA", "P")[i % 4])
    for path in (place.data / "cityscapes/gtFine").rglob("*.png"):
        labels = np.array(Image.open(path))
        image = Image.fromarray(labels, "P")  # ids with colours to look at
        image.putpalette(noise(np.random.default_rng(0), 16, 16).tobytes())
        image.save(path)
    assert run_tool("seg_train", *argv) == 0
    assert run_tool("seg_test", *argv) == 0


@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("which", ["all", "one"])
def test_all_ignored_batches_train_on(place, ohem, which):
    """Labels of licence plates (255) alone: no loss, and no NaN."""
    argv = place.cityscapes("LOSS.USE_OHEM", str(ohem), "LOSS.OHEMKEEP", "10", "TRAIN.WD", "0")
    labels = sorted((place.data / "cityscapes/gtFine/train").rglob("*.png"))
    for path in labels if which == "all" else labels[:3]:
        Image.fromarray(np.full((32, 64), 255, np.uint8)).save(path)
    assert run_tool("seg_train", *argv) == 0
    run = place.output / "cityscapes/seg_mdeq_TINY"
    records = [r for r in read_metrics(run) if r["kind"] == "train"]
    assert len(records) == 4
    losses = [r["loss"] for r in records]
    if which == "all":
        assert losses == [0.0] * 4
    else:
        assert 0 in losses
        assert all(math.isfinite(loss) for loss in losses)
        assert max(losses) > 1
    assert all(t.isfinite().all() for t in load(run / WEIGHTS).values() if t.is_floating_point())


def test_a_validation_set_without_a_labelled_pixel(place):
    """Figures are nan, and the run goes on to its end."""
    argv = place.cityscapes("TRAIN.END_EPOCH", "2")
    for path in (place.data / "cityscapes/gtFine/val").rglob("*.png"):
        Image.fromarray(np.zeros((32, 64), np.uint8)).save(path)  # "unlabeled"
    assert run_tool("seg_train", *argv) == 0
    run = place.output / "cityscapes/seg_mdeq_TINY"
    assert [math.isnan(r["mIoU"]) for r in read_metrics(run) if r["kind"] == "valid"] == [True] * 2
    assert run_tool("seg_test", *argv) == 0


def test_lists_written_again_are_the_same(place):
    place.cityscapes()
    before = contents(place.data)
    write_lists(place.data)
    assert contents(place.data) == before
