"""tools/classify.py: pictures of any form and size, and what it says of bad ones."""

import csv
import os
import re

import numpy as np
import pytest
from PIL import Image

from image_files import noise
from mdeq_vision.datasets.digits import split_digits
from mdeq_vision.prediction.command import classify
from picture_forms import grey_forms, turned
from small_runs import ROOM

MODELS = ROOM.parent / "docs/models"
PAGE = ROOM.parent / "docs/images.md"
DIGITS_FILE = str(MODELS / "digits.safetensors")
LINE = re.compile(r"(?P<file>.*) \| (?P<classes>.*) \| (?P<n>\d+) evaluations, residual \S+")


@pytest.fixture
def digit():
    """A three, uint8 (8, 8), and enlarged."""
    test = split_digits()["test"]
    (first, *_) = np.flatnonzero(test.labels == 3)
    return (test.images[first] * 255).round().astype(np.uint8)


def lines(capsys):
    """What was printed for each file, and the lines on stderr."""
    out, err = capsys.readouterr()
    return {m["file"]: m for m in map(LINE.fullmatch, out.splitlines())}, err.splitlines()


def test_all_forms_of_a_digit(digit, tmp_path, capsys):
    """Grey, 16 bits, palette, RGB, transparent, CMYK, turned: one digit, and one answer."""
    large = np.asarray(Image.fromarray(digit).resize((80, 80), Image.Resampling.BICUBIC))
    wide = np.pad(large, ((0, 0), (31, 31)))
    paths = [str(path) for path in grey_forms(wide, tmp_path).values()]
    assert classify([DIGITS_FILE, *paths, "--top", "2"]) == 0
    found, err = lines(capsys)
    assert not err
    assert list(found) == paths
    shares = [float(re.match(r"3 (\d+\.\d+) %, ", m["classes"])[1]) for m in found.values()]
    assert min(shares) > 90
    assert max(shares) - min(shares) < 1
    assert all(1 <= int(m["n"]) <= 20 for m in found.values())


def test_photographs_of_any_size(tmp_path, capsys):
    """Also one pixel, lines of pixels, and a JPEG that is turned by its tag."""
    sizes = [(640, 480), (97, 331), (1200, 900), (1, 1), (2000, 1), (1, 3000)]
    paths = [tmp_path / f"{w}x{h}.png" for w, h in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.fromarray(noise(np.random.default_rng(0), *size)).save(path)
    upright = Image.open(paths[1]).convert("RGB")
    paths += [turned(upright, tmp_path / "turned.jpg"), turned(upright, tmp_path / "turned.png", 8)]
    assert classify([DIGITS_FILE, *map(str, paths)]) == 0
    found, err = lines(capsys)
    assert not err
    assert list(found) == list(map(str, paths))
    assert found[str(paths[1])]["classes"] == found[str(paths[-1])]["classes"]


def test_the_table(digit, tmp_path, capsys):
    Image.fromarray(digit).save(tmp_path / "a, b.png")
    Image.fromarray(255 - digit).save(tmp_path / "other.png")
    table = tmp_path / "table.csv"
    files = [str(tmp_path / name) for name in ("a, b.png", "other.png")]
    assert classify([DIGITS_FILE, *files, "--top", "20", "--csv", str(table)]) == 0
    with open(table, newline="") as file:
        first, second = csv.DictReader(file)
    assert [first["image"], second["image"]] == files
    assert first["class_1"] == "3"
    assert sorted(first[f"class_{i}"] for i in range(1, 11)) == list("0123456789")
    assert sum(float(first[f"probability_{i}"]) for i in range(1, 11)) == pytest.approx(1, abs=1e-3)
    assert int(first["evaluations"]) > 0
    assert 0 < float(first["residual"]) < 1


def test_bad_pictures_lose_no_others(digit, tmp_path, capsys):
    good, text = tmp_path / "good.png", tmp_path / "text.png"
    Image.fromarray(digit).save(good)
    text.write_text("no picture")
    half = tmp_path / "half.jpg"
    Image.fromarray(noise(np.random.default_rng(0), 60, 60)).save(half)
    half.write_bytes(half.read_bytes()[:700])
    (tmp_path / "empty").mkdir()
    table = tmp_path / "table.csv"
    bad = [text, half, tmp_path / "gone.png", tmp_path / "empty", tmp_path / ("x" * 300)]
    argv = [DIGITS_FILE, str(bad[0]), str(good), *map(str, bad[1:]), "--csv", str(table)]
    assert classify(argv) == 2
    found, err = lines(capsys)
    assert list(found) == [str(good)]
    assert len(table.read_text().splitlines()) == 2
    assert len(err) == 6
    for path in bad:
        assert [str(path) in line for line in err].count(True) == 1
    assert err[-1] == "classify.py: 5 of 6 could not be used: see the lines 'left out'"


@pytest.mark.parametrize("name", ["text.png", "empty", "gone.png", "pipe.png", "loop.png"])
def test_a_single_bad_picture_is_one_line(tmp_path, capsys, name):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes into it
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert classify([DIGITS_FILE, str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("classify.py: ")
    assert str(tmp_path / name) in err


def test_a_name_without_letters(capsys):
    """It would stand for the folder of the command, with all pictures below it."""
    assert classify([DIGITS_FILE, ""]) == 2
    assert "the name of a picture is empty" in capsys.readouterr().err


def test_a_folder_stands_for_its_pictures(digit, tmp_path, capsys):
    for name in ("b/2.png", "a.PNG", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(digit).save(tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("not read")
    assert classify([DIGITS_FILE, str(tmp_path)]) == 0
    assert list(lines(capsys)[0]) == [str(tmp_path / "a.PNG"), str(tmp_path / "b/2.png")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--csv", "{tmp}/a.png"], "is the file that is read"),
        (["--csv", "{tmp}"], "--csv: .* is a folder"),
        (["--csv", "{tmp}/a.png/t.csv"], "--csv: .* cannot be written to"),
        (["--top", "0"], "--top is 0"),
        (["--topp", "1"], "unknown flag --topp: did you mean --top"),
        (["--device", "cuda:77"], "the device cuda:77 cannot be used here"),
    ],
)
def test_refusals(digit, tmp_path, capsys, more, message):
    Image.fromarray(digit).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    argv = [DIGITS_FILE, str(tmp_path / "a.png"), *(a.format(tmp=tmp_path) for a in more)]
    assert classify(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_model_of_the_other_task(tmp_path, capsys):
    assert classify([str(MODELS / "scenes.safetensors"), "a.png"]) == 2
    assert "is a model for tools/segment.py" in capsys.readouterr().err


def test_the_line_of_the_page(capsys, monkeypatch):
    monkeypatch.chdir(ROOM)
    (words,) = re.findall(r"^python tools/classify\.py (.*)$", PAGE.read_text(), re.MULTILINE)
    assert classify(words.split()) == 0
    ((file, found),) = lines(capsys)[0].items()
    assert file == "../docs/figures/digit.png"
    assert found["classes"].startswith("2 9")
