"""tools/segment.py: the files that it writes for pictures of any form and size."""

import re

import numpy as np
import pytest
from PIL import Image

from image_files import noise
from mdeq_vision.datasets import DIGIT_SCENES
from mdeq_vision.datasets.digit_scenes import render_scene
from mdeq_vision.prediction.command import segment
from picture_forms import turned
from small_runs import ROOM

MODELS = ROOM.parent / "docs/models"
SCENES_FILE = str(MODELS / "scenes.safetensors")
KINDS = ("labels", "colours", "overlays", "confidence")


@pytest.fixture
def scene(tmp_path):
    """A test scene 64x48 as a file; and its true labels."""
    picture, labels = render_scene("test", 0, (64, 48))
    Image.fromarray(picture).save(tmp_path / "scene.png")
    return tmp_path / "scene.png", labels


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def test_what_is_written(scene, tmp_path, capsys):
    path, truth = scene
    out = tmp_path / "out"
    assert segment([SCENES_FILE, str(path), "--out", str(out)]) == 0
    labels, colours, overlay, confidence = (read(out / kind / "scene.png") for kind in KINDS)
    assert labels.shape == truth.shape == confidence.shape
    assert (labels == truth).mean() > 0.9
    assert np.array_equal(colours, np.array(DIGIT_SCENES.palette, np.uint8)[labels])
    assert confidence.min() >= 255 // 11
    assert confidence.mean() > 200
    # The picture at four times its size, beside it the mean of picture and colours.
    gap = 6
    left, right = overlay[:192, :256], overlay[:192, 256 + gap : 512 + gap]
    assert np.array_equal(left[::4, ::4], read(path))
    mean = (read(path).astype(float) + colours) / 2
    assert np.abs(right[::4, ::4] - mean).max() <= 0.5
    legend = {tuple(rgb) for rgb in overlay[:, 512 + gap :].reshape(-1, 3)}
    for number, rgb in enumerate(DIGIT_SCENES.palette):
        if rgb != (255, 255, 255):  # the page's own colour
            assert (rgb in legend) == (number in labels), number
    line, file = capsys.readouterr().out.splitlines()
    share = float(re.search(r" \| background (\d+\.\d) %, ", line)[1])
    assert share == pytest.approx(100 * (labels == 0).mean(), abs=0.06)
    said = float(re.search(r" \| confidence (\d\.\d+) \| \d+ evaluations, residual", line)[1])
    assert said == pytest.approx(confidence.mean() / 255, abs=0.003)
    assert file.strip() == str(out / "overlays/scene.png")


def test_pictures_of_any_form_and_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = [(320, 200), (37, 91), (500, 333), (1, 1), (300, 1)]
    paths = {}
    for width, height in sizes:
        path = tmp_path / f"{width}x{height}.png"
        Image.fromarray(noise(rng, width, height)).save(path)
        paths[path] = (height, width)
    photo = Image.open(tmp_path / "37x91.png").convert("RGB")
    forms = {
        "grey.png": photo.convert("L"),
        "deep.png": Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257),
        "palette.gif": photo.convert("P"),
        "alpha.png": photo.convert("RGBA"),
        "cmyk.jpg": photo.convert("CMYK"),
    }
    for name, form in forms.items():
        form.save(tmp_path / name)
        paths[tmp_path / name] = (91, 37)
    paths[turned(photo, tmp_path / "turned.png")] = (91, 37)
    out = tmp_path / "out"
    assert segment([SCENES_FILE, *map(str, paths), "--out", str(out)]) == 0
    for path, shape in paths.items():
        for kind in ("labels", "confidence"):
            assert read(out / kind / f"{path.stem}.png").shape == shape
    # The turned one and its overlay are upright; deep grey is as grey.
    for kind in KINDS:
        upright, other = (read(out / kind / f"{name}.png") for name in ("37x91", "turned"))
        assert np.array_equal(upright, other)
        assert np.array_equal(*(read(out / kind / f"{name}.png") for name in ("grey", "deep")))


def test_large_pictures_are_not_grown(tmp_path, capsys):
    Image.fromarray(noise(np.random.default_rng(0), 900, 600)).save(tmp_path / "photo.png")
    assert segment([SCENES_FILE, str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out/labels/photo.png").shape == (600, 900)
    height, width, _ = read(tmp_path / "out/overlays/photo.png").shape
    assert height == 600
    assert 1800 < width < 2300


def test_one_name_in_two_folders(scene, tmp_path, capsys):
    path, _ = scene
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    path.rename(tmp_path / "a/x.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b/X.jpg")
    Image.new("RGB", (30, 10)).save(tmp_path / "b/x-2.png")
    out = tmp_path / "out"
    files = [str(tmp_path / name) for name in ("a/x.png", "b/X.jpg", "b/x-2.png")]
    assert segment([SCENES_FILE, *files, "--out", str(out)]) == 0
    shapes = {p.stem: read(p).shape for p in (out / "labels").iterdir()}
    assert shapes == {"x": (48, 64), "X-2": (10, 20), "x-2-2": (10, 30)}
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()[1::2]]
    assert printed == [str(out / f"overlays/{name}.png") for name in ("x", "X-2", "x-2-2")]


def test_folders_keep_their_form(scene, tmp_path, capsys):
    path, _ = scene
    (tmp_path / "in/deeper").mkdir(parents=True)
    path.rename(tmp_path / "in/deeper/x.png")
    (tmp_path / "in/bad.png").write_text("no picture")
    assert segment([SCENES_FILE, str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out/labels/deeper/x.png").is_file()
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"left out: image {tmp_path / 'in/bad.png'} cannot be read")
    assert err[1:] == ["segment.py: 1 of 2 could not be used: see the lines 'left out'"]


def test_refusals(scene, tmp_path, capsys):
    path, _ = scene
    place = tmp_path / "labels"
    place.mkdir()
    Image.open(path).save(place / "scene.png")
    before = (place / "scene.png").read_bytes()
    for argv, message in (
        ([SCENES_FILE, str(path), "--out", str(path)], "--out: .* cannot be written to"),
        ([SCENES_FILE, str(path), "--out", "/proc"], "--out: /proc cannot be written to"),
        ([SCENES_FILE, str(place / "scene.png"), "--out", str(tmp_path)], "is one of the pictures"),
        ([SCENES_FILE], "the following arguments are required: IMAGE"),
        ([str(MODELS / "digits.safetensors"), str(path)], "is a model for tools/classify.py"),
        ([str(tmp_path / "gone"), str(path)], "no file .*gone"),
    ):
        assert segment(argv) == 2
        out, err = capsys.readouterr()
        assert not out
        assert len(err.splitlines()) == 1
        assert re.search(message, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels", "scene.png"]
    assert (place / "scene.png").read_bytes() == before


def test_the_figure_of_the_page(tmp_path, capsys, monkeypatch):
    """The page's command draws the page's figure, up to the drawing of letters."""
    monkeypatch.chdir(ROOM)
    docs = ROOM.parent / "docs"
    page = (docs / "images.md").read_text()
    (words,) = re.findall(r"^python tools/segment\.py (.*)$", page, re.MULTILINE)
    assert segment([*words.split(), "--out", str(tmp_path)]) == 0
    found, shown = read(tmp_path / "overlays/scene.png"), read(docs / "figures/segment.png")
    assert found.shape[0] == shown.shape[0]
    drawn = (slice(None), slice(0, 512))
    assert np.abs(found[drawn].astype(float) - shown[drawn]).mean() < 1
