"""Colours, overlays, submission files and the panel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib.errors import InputError
from mdeq_vision.pictures import colour, overlay, panel, save_png, save_prediction, to_label_ids

PALETTE = ((128, 64, 128), (244, 35, 232), (70, 70, 70))
FACTS = SimpleNamespace(
    class_names=("road", "sidewalk", "building"), palette=PALETTE, label_ids=(7, 8, 11)
)
IDS = np.array([[0, 1, 2], [255, 2, 0]])


def picture(height=2, width=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ---- arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int16])
def test_colour(dtype):
    found = colour(IDS.astype(dtype), PALETTE, 255)
    assert found.dtype == np.uint8
    expected = [[PALETTE[i] if i < 255 else (0, 0, 0) for i in row] for row in IDS]
    assert (found == expected).all()


def test_colour_of_tensors():
    found = colour(torch.from_numpy(IDS), torch.tensor(PALETTE, dtype=torch.uint8), 255)
    assert (found == colour(IDS, PALETTE, 255)).all()


def test_colour_where_the_ignore_label_is_negative():
    assert (colour(np.where(IDS == 255, -1, IDS), PALETTE, -1) == colour(IDS, PALETTE, 255)).all()
    assert (colour(IDS[:1].astype(np.uint8), PALETTE, -1) == colour(IDS[:1], PALETTE, 255)).all()


@pytest.mark.parametrize("ignore", [255, None])
def test_colour_of_a_label_that_is_no_class(ignore):
    with pytest.raises(InputError, match=r"label 3 is not a class in 0\.\.2"):
        colour([[0, 3]], PALETTE, ignore)


def test_overlay():
    scene = picture()
    found = overlay(scene, IDS, PALETTE, 255, alpha=0.25)
    expected = np.rint(0.75 * scene + 0.25 * colour(IDS, PALETTE, 255))
    expected[1, 0] = scene[1, 0]  # ignored: as it was
    assert found.dtype == np.uint8
    assert (found == expected).all()
    labelled = IDS != 255
    assert (overlay(scene, IDS, PALETTE, 255, 0) == scene).all()
    full = overlay(scene, IDS, PALETTE, 255, 1)
    assert (full[labelled] == colour(IDS, PALETTE, 255)[labelled]).all()


def test_to_label_ids():
    found = to_label_ids([[0, 2], [1, 1]], FACTS.label_ids)
    assert found.dtype == np.uint8
    assert found.tolist() == [[7, 11], [8, 8]]
    wide = to_label_ids([[0, 1]], (7, 300))
    assert wide.dtype == np.uint16
    assert wide.tolist() == [[7, 300]]
    with pytest.raises(InputError, match="label 255"):
        to_label_ids(IDS, FACTS.label_ids)
    with pytest.raises(InputError, match="label_ids must be numbers of 0 to 65535"):
        to_label_ids([[0]], (7, -1))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (colour, ([0, 1], PALETTE, 255), r"a label map is integers \(H, W\)"),
        (colour, ([[0.0]], PALETTE, 255), "float64"),
        (colour, ([[0]], ((0, 0, 256),), 255), "palette"),
        (colour, ([[0]], ((0, 0),), 255), "palette"),
        (overlay, (picture(3, 3), IDS, PALETTE, 255), r"\(2, 3\) .* does not fit .* \(3, 3\)"),
        (overlay, (picture() / 255, IDS, PALETTE, 255), "a picture is uint8"),
        (overlay, (picture(), IDS, PALETTE, 255, 1.5), "alpha is 1.5"),
    ],
)
def test_bad_arrays(function, arguments, message):
    with pytest.raises(InputError, match=message):
        function(*arguments)


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [picture(), IDS.astype(np.uint8), IDS.astype(np.uint16) + 256])
def test_save_png(tmp_path, array):
    path = tmp_path / "new" / "folder" / "image.png"
    save_png(array, path)
    assert (read(path) == array).all()
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]  # nothing temporary


@pytest.mark.parametrize("array", [IDS, picture()[..., :2], picture()[None]])
def test_save_png_of_bad_arrays(tmp_path, array):
    with pytest.raises(InputError, match="a PNG is written of uint8"):
        save_png(array, tmp_path / "image.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["aachen_0.1_leftImg8bit", "aachen/0_leftImg8bit"])
def test_save_prediction(tmp_path, name):
    scene, prediction = picture(), np.array([[0, 1, 2], [1, 2, 0]])
    save_prediction(tmp_path, name, scene, torch.from_numpy(prediction), FACTS)
    assert read(tmp_path / f"labels/{name}.png").tolist() == [[7, 8, 11], [8, 11, 7]]
    assert (read(tmp_path / f"colours/{name}.png") == colour(prediction, PALETTE, None)).all()
    both = read(tmp_path / f"overlays/{name}.png")
    assert both.shape == (2, 6, 3)
    assert (both[:, :3] == scene).all()
    assert (both[:, 3:] == overlay(scene, prediction, PALETTE, None)).all()


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="leads out of the folder"):
        save_prediction(tmp_path / "in", name, picture(), np.zeros((2, 3), int), FACTS)
    assert not list(tmp_path.iterdir())


# ---- the panel -------------------------------------------------------------------------------

TITLES = ("input", "truth", "prediction")


def rows(n, height=64, width=64):
    ids = np.arange(height * width).reshape(height, width) % 3
    return [(picture(height, width, seed), ids, np.flip(ids, 1)) for seed in range(n)]


@pytest.mark.parametrize("truth", [True, False])
def test_panel_shows_every_pixel_enlarged(tmp_path, truth):
    scenes = [(p, t if truth else None, q) for p, t, q in rows(2)]
    path = tmp_path / "panel.png"
    panel(scenes, TITLES, FACTS.class_names, PALETTE, path)
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]
    image = read(path)[..., :3]
    assert image.shape[0] >= 2 * 256
    assert image.shape[1] >= 3 * 256 + 80  # the legend beside it
    for scene, true_ids, predicted in scenes:
        shown = [scene, None, colour(predicted, PALETTE, None)]
        if truth:
            shown[1] = colour(true_ids, PALETTE, 255)
        # No other colour of the file is that of the noisy picture's first pixel.
        y, x = np.argwhere((image == scene[0, 0]).all(2))[0]
        for j, part in enumerate(shown):
            if part is not None:
                left = x + j * (256 + 8)
                found = image[y : y + 256, left : left + 256]
                assert (found == part.repeat(4, axis=0).repeat(4, axis=1)).all()
    # Legend: something is drawn to the right of the scenes.
    assert (image[:, 3 * 256 + 40 :] < 128).any()


@pytest.mark.parametrize(
    ("size", "zoom", "wide"),
    [((8, 16), None, 3 * 256), ((40, 100), 1.5, 450), ((200, 400), None, 1200)],
)
def test_panel_of_other_sizes(tmp_path, size, zoom, wide):
    path = tmp_path / "panel.png"
    panel(rows(1, *size), TITLES, FACTS.class_names, PALETTE, path, zoom)
    assert wide < read(path).shape[1] < wide + 250


def test_panel_of_large_scenes_is_reduced(tmp_path):
    path = tmp_path / "panel.png"
    panel(rows(1, 512, 1024), TITLES, FACTS.class_names, PALETTE, path)
    assert 3 * 512 < read(path).shape[1] < 3 * 512 + 250


def test_panel_names_ignored_pixels(tmp_path):
    scene, ids, predicted = rows(1)[0]
    heights = []
    for label in (0, 255):
        ids[0, 0] = label
        path = tmp_path / f"{label}.png"
        panel([(scene, ids, predicted)], TITLES, FACTS.class_names, PALETTE, path)
        legend = read(path)[40:, 3 * 256 + 40 :, :3]
        heights.append(np.flatnonzero((legend < 200).any((1, 2))).max())
    assert heights[1] > heights[0]  # a line more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "at least one scene"),
        ({"titles": ("input",)}, "3 titles"),
        ({"class_names": ("road",)}, "1 names and 3 colours"),
        ({"zoom": 0}, "zoom is 0"),
        ({"rows": [(picture(), None, [[0, 1, 9], [0, 0, 0]])]}, "label 9"),
    ],
)
def test_bad_panels(tmp_path, change, message):
    arguments = {
        "rows": rows(1),
        "titles": TITLES,
        "class_names": FACTS.class_names,
        "palette": PALETTE,
        "path": tmp_path / "panel.png",
    }
    with pytest.raises(InputError, match=message):
        panel(**(arguments | change))
    assert not list(tmp_path.iterdir())
