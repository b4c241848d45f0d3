"""Pictures of the user's own are read as a person sees them; published data as their files are."""

import io

import numpy as np
import pytest
from PIL import Image

from image_files import noise, settings, write_imagenet
from lib.errors import InputError
from mdeq_vision.datasets import get_cls_dataset, get_seg_dataset
from mdeq_vision.datasets.image_reading import as_seen, read_picture, read_rgb, read_size
from picture_forms import ORIENTATION, UNDONE, grey_forms, turned

GREY = np.arange(0, 240, dtype=np.uint8).reshape(20, 12)
CLASSES = "classes:\n  - {name: a, colour: [1, 2, 3]}\n  - {name: b, colour: [4, 5, 6]}\n"


def test_all_forms_show_the_same(tmp_path):
    for form, path in grey_forms(GREY, tmp_path).items():
        rgb = np.array(read_picture(path)).astype(int)
        assert rgb.shape == (20, 12, 3), form
        assert np.abs(rgb - GREY[..., None]).max() <= 1, form
        assert read_size(path, upright=True) == (12, 20), form


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.array(read_picture(tmp_path / "deep.png"))[..., 0]
    assert found.tolist() == [[0, 0, 1, 1], [128, 156, 255, 255]]


def test_transparency_shows_white():
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 51))  # one fifth of the colour
    assert as_seen(half, "half").getpixel((0, 0)) == (244, 224, 204)
    key = Image.new("P", (2, 1))
    key.putpalette([9, 9, 9, 7, 7, 7])
    key.putpixel((1, 0), 1)
    key.info["transparency"] = 0
    assert list(np.array(as_seen(key, "key"))[0, :, 0]) == [255, 7]


@pytest.mark.parametrize("tag", UNDONE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_turned_upright(tmp_path, tag, suffix):
    picture = Image.new("RGB", (48, 32))
    picture.paste((255, 0, 0), (0, 0, 16, 16))  # upper left
    path = turned(picture, tmp_path / f"photo.{suffix}", tag)
    upright = np.array(read_picture(path))
    assert upright.shape == (32, 48, 3)
    assert upright[:12, :12, 0].min() > 200
    assert upright[20:, 20:].max() < 50
    assert read_size(path, upright=True) == (48, 32)


def test_damaged_tags_turn_nothing():
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=b"Exif\0\0no such header")
    assert as_seen(Image.open(file), "photo").size == (4, 2)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_range_are_refused(tmp_path, mode):
    path = tmp_path / "deep.tif"
    Image.new(mode, (3, 2)).save(path)
    with pytest.raises(InputError, match=rf"deep\.tif has mode {mode}: save it with 8 bits"):
        read_picture(path)


def test_published_data_are_read_as_the_files_are(tmp_path):
    """Readers of ImageNet ignore the tag, and so do its figures."""
    write_imagenet(tmp_path, classes=1, per_class=1, size=(40, 20))
    (path,) = (tmp_path / "images/val").rglob("*.JPEG")
    picture = Image.open(path).convert("RGB")
    exif = picture.getexif()
    exif[ORIENTATION] = 3
    picture.save(path, exif=exif, quality=95)
    model = {"IMAGE_SIZE": [14, 14], "NUM_CLASSES": 1}
    items = {
        name: get_cls_dataset(settings(name, tmp_path, MODEL=model), "test")[0][0]
        for name in ("imagenet", "own_pictures")
    }
    assert (items["imagenet"] - items["own_pictures"].flip(1, 2)).abs().max() < 0.1
    assert (items["imagenet"] - items["own_pictures"]).abs().max() > 0.5
    assert np.array_equal(np.array(read_rgb(path))[::-1, ::-1], np.array(read_picture(path)))


def test_labels_belong_to_the_upright_scene(tmp_path):
    """The label file has the upright form, as a person would draw it."""
    scene = Image.fromarray(noise(np.random.default_rng(0), 24, 16))
    turned(scene, tmp_path / "photo.png")
    labels = np.zeros((16, 24), np.uint8)
    labels[:, 12:] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    (tmp_path / "scenes.lst").write_text("photo.png labels.png\n")
    (tmp_path / "classes.yaml").write_text(CLASSES)
    sets = {"TRAIN_SET": "scenes.lst", "TEST_SET": "scenes.lst", "NUM_CLASSES": 2}
    cfg = settings("own_scenes", tmp_path, DATASET=sets, TRAIN={"IGNORE_LABEL": 255})
    dataset = get_seg_dataset(cfg, "test")
    image, found = dataset[0]
    assert image.shape == (3, 16, 24)
    assert np.array_equal(found.numpy(), labels)
    assert np.array_equal(dataset.picture(0), np.array(scene))
    dataset.check_batches(cfg)  # sizes by the headers
    assert dataset._image_size(0) == (24, 16)
