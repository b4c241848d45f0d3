"""Films: each frame is solved from the equilibrium of the frame before."""

from itertools import chain, pairwise, repeat

import numpy as np
import pytest
import torch
from PIL import Image

import mdeq_vision
from lib.errors import InputError
from mdeq_vision.datasets.digit_scenes import render_film, render_scene
from mdeq_vision.layer import MultiscaleLayer
from mdeq_vision.model import FOLLOW_THRES
from mdeq_vision.prediction.command import segment
from small_runs import ROOM

SCENES_FILE = ROOM.parent / "docs/models/scenes.safetensors"
SIZE = (64, 64)


@pytest.fixture(scope="module")
def scenes():
    return mdeq_vision.load(SCENES_FILE)


def pictures(index, frames, speed=0.5):
    return [Image.fromarray(image) for image, _ in render_film("test", index, SIZE, frames, speed)]


def test_a_film_begins_as_its_scene_and_only_its_digits_move():
    frames = list(render_film("test", 3, SIZE, 30, 1.0))
    for found, expected in zip(frames[0], render_scene("test", 3, SIZE), strict=True):
        assert np.array_equal(found, expected)
    images, labels = (np.stack(parts) for parts in zip(*frames, strict=True))
    never = (labels == 0).all(axis=0)
    far = never & ~_near((labels != 0).any(axis=0), 3)
    assert far.any()
    assert (images[:, far] == images[0, far]).all()
    counts = (labels != 0).sum(axis=(1, 2))
    assert 0.7 * counts[0] < counts.min() <= counts.max() < 1.4 * counts[0]
    assert all((a != b).any() for a, b in pairwise(labels))
    rest = list(render_film("test", 3, SIZE, 3, 0.0))
    assert all(np.array_equal(image, rest[0][0]) for image, _ in rest)


def _near(mask, reach):
    wide = torch.nn.functional.max_pool2d(
        torch.tensor(mask)[None].float(), 2 * reach + 1, stride=1, padding=reach
    )
    return wide[0].bool().numpy()


def test_frames_that_follow_take_few_evaluations_and_agree_with_whole_solves(scenes):
    film, frames = scenes.film(), pictures(0, 8)
    whole = scenes.segment(frames)
    found = [film(frame) for frame in frames]
    assert np.array_equal(found[0].labels, whole[0].labels)  # the first is solved from zeros
    assert found[0].evaluations == whole[0].evaluations
    assert [f.evaluations for f in found[1:]] == [FOLLOW_THRES + 1] * 7
    for one, other in zip(found, whole, strict=True):
        assert (one.labels == other.labels).mean() > 0.98
    # From zeros, so few evaluations give another picture.
    own, scenes.model.f_thres = scenes.model.f_thres, FOLLOW_THRES
    try:
        short = scenes.segment(frames[-1])
    finally:
        scenes.model.f_thres = own
    assert short.evaluations == FOLLOW_THRES + 1
    assert (short.labels == whole[-1].labels).mean() < 0.95


def test_another_scene_or_size_is_solved_to_the_end(scenes):
    film, (first, other) = scenes.film(), (pictures(index, 1)[0] for index in (0, 1))
    film(first)
    cut, whole = film(other), scenes.segment(other)
    assert cut.evaluations > whole.evaluations  # those of the wrong start, too
    assert (cut.labels == whole.labels).mean() > 0.995
    assert cut.residual <= 1e-3
    small = other.crop((0, 0, 64, 48))
    assert film(small).evaluations == scenes.segment(small).evaluations


def test_a_picture_that_rests_comes_to_its_equilibrium(scenes):
    film, frame = scenes.film(), pictures(2, 1)[0]
    film(pictures(2, 2, speed=2.0)[1])
    residuals = [film(frame).residual for _ in range(12)]
    assert residuals[0] > 1e-2
    assert residuals[-1] < 1e-3


def test_windows_and_mirror_images_have_a_state_each(scenes):
    test = scenes.settings.TEST
    scenes.settings.defrost()
    own, test.FLIP_TEST, test.BASE_SIZE = (test.FLIP_TEST, test.BASE_SIZE), True, 96
    try:
        film, frame = scenes.film(), pictures(4, 1)[0]
        first, second, whole = film(frame), film(frame), scenes.segment(frame)
    finally:
        test.FLIP_TEST, test.BASE_SIZE = own
    assert first.solves == second.solves == 8  # four windows, twice
    assert first.evaluations == whole.evaluations
    assert np.array_equal(first.labels, whole.labels)
    assert second.evaluations <= 8 * (FOLLOW_THRES + 1)
    assert (second.labels == whole.labels).mean() > 0.995


def test_thresholds_are_counts(scenes):
    with pytest.raises(InputError, match="f_thres is 0, but must be"):
        scenes.film(0)
    with pytest.raises(InputError, match="check is -1, but must be"):
        scenes.film(check=-1)


def test_checked_frames_are_those_of_the_film_and_come_to_one_equilibrium(scenes):
    frames = pictures(3, 5, speed=1.0)
    plain, checked = scenes.film(), scenes.film(check=2)
    for number, frame in enumerate(frames):
        expected, found = plain(frame), checked(frame)
        assert np.array_equal(found.labels, expected.labels)
        assert (found.evaluations, found.residual) == (expected.evaluations, expected.residual)
        assert expected.apart is None
        if number in (2, 4):  # far nearer than the film's own residual: both went on to the end
            assert 0 < found.apart < 1e-3 < found.residual
        else:
            assert found.apart is None


def two_equilibria(biases):
    """tanh(20 (z + b)): fixed points at -1 and 1; from zeros a solve finds that of b's sign."""

    def prepare(layer, injection, z0):
        bias = next(biases)
        return lambda z: [torch.tanh(20 * (part + bias)) for part in z]

    return prepare


def no_equilibrium(layer, injection, z0):
    return lambda z: [torch.full_like(part, float("nan")) for part in z]


@pytest.mark.filterwarnings("ignore:f is not finite")
@pytest.mark.parametrize(
    ("prepare", "line", "end"),
    [
        # The first frame leads to the negative one. The next solves have the other sign.
        (two_equilibria(chain([-0.3], repeat(0.3))), "another equilibrium", ""),
        (no_equilibrium, "", "; 2 did not settle"),
        (MultiscaleLayer.prepare, "", ""),
    ],
    ids=["two", "none", "one"],
)
def test_the_command_says_how_often_films_follow_another_equilibrium(
    tmp_path, capsys, monkeypatch, prepare, line, end
):
    (tmp_path / "film").mkdir()
    for number, frame in enumerate(pictures(5, 3)):
        frame.save(tmp_path / "film" / f"{number}.png")
    monkeypatch.setattr(MultiscaleLayer, "prepare", prepare)
    places = [str(SCENES_FILE), str(tmp_path / "film"), "--out", str(tmp_path / "out")]
    assert segment([*places, "--sequence", "--check", "1"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    number = 2 if line else 0
    assert sum("another equilibrium" in text for text in lines) == number
    assert last.startswith(f"{number} of 2 checked frames follow another equilibrium than a solve")
    assert last.endswith(f"(relative distance above 0.01){end}")


def test_a_film_too_short_for_its_checks(tmp_path, capsys):
    (tmp_path / "film").mkdir()
    for number, frame in enumerate(pictures(5, 2)):
        frame.save(tmp_path / "film" / f"{number}.png")
    flags = ["--out", str(tmp_path / "out"), "--sequence", "--check", "2"]
    assert segment([str(SCENES_FILE), str(tmp_path / "film"), *flags]) == 0
    assert capsys.readouterr().out.endswith("\nno frame was checked: the film has at most 2\n")
    assert segment([str(SCENES_FILE), str(tmp_path / "gone.png"), *flags]) == 2
    assert "checked" not in capsys.readouterr().out


def test_the_command_follows_a_film_and_leaves_out_what_is_no_picture(tmp_path, capsys):
    film = tmp_path / "film"
    film.mkdir()
    for number, frame in enumerate(pictures(5, 4)):
        frame.save(film / f"{number}.png")
    (film / "1.png").write_bytes(b"no picture")
    out = ["--out", str(tmp_path / "out")]
    assert segment([str(SCENES_FILE), str(film), "--sequence", "--f_thres", "2", *out]) == 2
    said = capsys.readouterr()
    assert "1 of 4 could not be used" in said.err
    evaluations = [line.split(" evaluations")[0].split()[-1] for line in said.out.splitlines()[::2]]
    assert evaluations[1:] == ["3", "3"]
    assert int(evaluations[0]) > 8
    assert sorted(path.name for path in (tmp_path / "out/labels").iterdir()) == [
        "0.png",
        "2.png",
        "3.png",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--f_thres", "3"], "give --sequence"),
        (["--sequence", "--f_thres", "0"], "--f_thres is 0"),
        (["--check", "3"], "--check is for frames of a film: give --sequence"),
        (["--sequence", "--check", "0"], "--check is 0"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, capsys, flags, message):
    picture = ROOM.parent / "docs/figures/scene.png"
    code = segment([str(SCENES_FILE), str(picture), "--out", str(tmp_path / "out"), *flags])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
