"""Cityscapes and the digit scenes: labels, lists, geometry, and what bad files say."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import noise, settings, write_cityscapes
from lib.errors import InputError
from mdeq_vision.datasets import CITYSCAPES, DIGIT_SCENES, SEGMENTATION, get_seg_dataset
from mdeq_vision.datasets.cityscapes_labels import to_train_ids
from mdeq_vision.datasets.digit_scenes import N_SCENES, render_scene
from mdeq_vision.datasets.digits import split_digits
from mdeq_vision.datasets.geometry import IGNORE, CentreCrop, TrainingGeometry
from mdeq_vision.inference import predict

LISTS = {
    "TRAIN_SET": "list/cityscapes/train.lst",
    "TEST_SET": "list/cityscapes/val.lst",
    "NUM_CLASSES": 19,
}
TRAIN = {"IMAGE_SIZE": [96, 48], "BASE_SIZE": 128, "IGNORE_LABEL": 255}


def city_settings(root, **dataset):
    return settings("cityscapes", root, DATASET=LISTS | dataset, TRAIN=TRAIN)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes"))


@pytest.fixture
def city(pristine, tmp_path):
    """A tree to spoil."""
    return shutil.copytree(pristine, tmp_path / "data")


def refused(cfg, split="train", item=None) -> str:
    def build_and_read():
        dataset = get_seg_dataset(cfg, split)
        assert item is not None
        return dataset[item]

    with pytest.raises(InputError) as error:
        build_and_read()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Cityscapes ----------------------------------------------------------------------------------


def test_label_ids_become_the_official_train_ids():
    names = {7: "road", 8: "sidewalk", 11: "building", 17: "pole", 23: "sky", 26: "car"}
    names |= {31: "train", 32: "motorcycle", 33: "bicycle", 19: "traffic_light", 24: "person"}
    ids = np.arange(34, dtype=np.uint8)[None]
    train_ids = to_train_ids(ids, "file")[0]
    assert train_ids.dtype == np.uint8
    for label_id, name in names.items():
        assert CITYSCAPES.class_names[train_ids[label_id]] == name
    assert sorted(train_ids[train_ids != IGNORE]) == list(range(19))
    np.testing.assert_array_equal(np.flatnonzero(train_ids != IGNORE), CITYSCAPES.label_ids)
    # Licence plates: id -1, which is 255 in a file of 8 bits.
    for plates in (np.array([[255]], np.uint8), np.array([[-1]], np.int32)):
        assert to_train_ids(plates, "file").item() == IGNORE


@pytest.mark.parametrize("facts", [CITYSCAPES, DIGIT_SCENES])
def test_facts_agree_with_each_other(facts):
    n = len(facts.class_names)
    assert len(set(facts.class_names)) == len(set(facts.palette)) == len(set(facts.label_ids)) == n
    assert np.asarray(facts.palette, np.uint8).shape == (n, 3)
    assert facts.class_weights is None or len(facts.class_weights) == n
    json.dumps(facts.palette)  # plain numbers


def test_test_items_are_whole_normalised_images_with_train_ids(pristine):
    dataset = get_seg_dataset(city_settings(pristine), "test")
    assert len(dataset) == 2
    assert dataset.has_labels
    assert dataset.name(1) == "frankfurt_000001_000019_leftImg8bit"
    image, labels = dataset[1]
    assert (image.shape, image.dtype) == ((3, 64, 128), torch.float32)
    assert (labels.shape, labels.dtype) == ((64, 128), torch.int64)
    folder = pristine / "cityscapes"
    stem = "val/frankfurt/frankfurt_000001_000019"
    picture = np.array(Image.open(folder / "leftImg8bit" / f"{stem}_leftImg8bit.png"))
    np.testing.assert_array_equal(dataset.picture(1), picture)
    expected = (picture / 255 - CITYSCAPES.mean) / CITYSCAPES.std
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)
    label_ids = np.array(Image.open(folder / "gtFine" / f"{stem}_gtFine_labelIds.png"))
    known = labels != 255
    assert 0.3 < known.float().mean() < 0.9
    back = np.array(CITYSCAPES.label_ids)[labels[known]]
    np.testing.assert_array_equal(back, label_ids[known.numpy()])


def test_ignore_label_may_be_minus_one(pristine):
    cfg = settings("cityscapes", pristine, DATASET=LISTS, TRAIN=TRAIN | {"IGNORE_LABEL": -1})
    labels = get_seg_dataset(cfg, "test")[0][1]
    assert labels.min() == -1
    assert labels.max() <= 18


def test_test_images_without_labels_are_all_ignored(pristine):
    cfg = city_settings(pristine, TEST_SET="list/cityscapes/test.lst")
    dataset = get_seg_dataset(cfg, "test")
    assert not dataset.has_labels
    assert (dataset[0][1] == 255).all()
    assert dataset[0][1].shape == (64, 128)


def test_training_items_have_the_crop_size_and_come_from_torchs_generator(pristine):
    dataset = get_seg_dataset(city_settings(pristine), "train")
    torch.manual_seed(1)
    first = [dataset[0] for _ in range(3)]
    torch.manual_seed(1)
    again = [dataset[0] for _ in range(3)]
    for (image, labels), (image_2, labels_2) in zip(first, again, strict=True):
        assert image.shape == (3, 48, 96)
        assert labels.shape == (48, 96)
        assert torch.equal(image, image_2)
        assert torch.equal(labels, labels_2)
    assert not torch.equal(first[0][0], first[1][0])


def first_train_files(root):
    stem = "train/aachen/aachen_000000_000019"
    image = root / "cityscapes" / "leftImg8bit" / f"{stem}_leftImg8bit.png"
    return image, root / "cityscapes" / "gtFine" / f"{stem}_gtFine_labelIds.png"


def test_size_mismatch_names_both_files_and_sizes(city):
    image, labels = first_train_files(city)
    Image.fromarray(np.zeros((60, 128), np.uint8)).save(labels)
    message = refused(city_settings(city), item=0)
    assert f"image {image} is 128x64" in message
    assert f"labels {labels} are 128x60" in message


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((64, 128), 34, np.uint8), "have the label id 34"),
        (np.full((64, 128), 300, np.uint16), "have the label id 300"),
        (np.zeros((64, 128, 3), np.uint8), "one integer per pixel"),
    ],
)
def test_label_file_of_another_kind_is_named(city, pixels, words):
    _, labels = first_train_files(city)
    Image.fromarray(pixels).save(labels)
    message = refused(city_settings(city), item=0)
    assert words in message
    assert str(labels) in message


def test_corrupt_label_file_is_named(city):
    _, labels = first_train_files(city)
    labels.write_bytes(labels.read_bytes()[:60])
    assert str(labels) in refused(city_settings(city), item=0)


def test_missing_files_are_counted_and_the_first_named(city):
    _, labels = first_train_files(city)
    labels.unlink()
    (city / "cityscapes/leftImg8bit/train/bochum/bochum_000003_000019_leftImg8bit.png").unlink()
    message = refused(city_settings(city))
    assert f"train.lst, line 1: {labels} does not exist (2 files" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "train.lst cannot be read (No such file or directory)"),
        ("\n\n", "train.lst is empty"),
        ("a b c\n", "train.lst, line 1: expected 'image' or 'image labels'"),
        ("a b\n\na\n", "train.lst, line 3: some lines name labels and some do not"),
        (b"\xff\xfe\n", "train.lst cannot be read"),
    ],
)
def test_bad_list_is_named(city, content, words):
    path = city / "list/cityscapes/train.lst"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(city_settings(city))


def test_list_that_does_not_suit_its_use_is_refused(city):
    cfg = city_settings(city, TRAIN_SET="list/cityscapes/test.lst")
    assert "names no labels: training needs them" in refused(cfg)
    path = city / "list/cityscapes/val.lst"
    path.write_text(path.read_text() * 2)
    assert "two images are named frankfurt_000000" in refused(city_settings(city), "test")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("DATASET", "NUM_CLASSES", 20, "but cityscapes has 19 classes: set it to 19"),
        ("DATASET", "DATASET", "camvid", f"choose {', '.join(SEGMENTATION)}"),
        ("TRAIN", "IGNORE_LABEL", 3, "TRAIN.IGNORE_LABEL 3 is the class 'wall'"),
        ("TRAIN", "IMAGE_SIZE", [0, 48], "sizes must be positive"),
        ("TRAIN", "SCALE_FACTOR", -1, "TRAIN.SCALE_FACTOR -1"),
        ("TRAIN", "DOWNSAMPLERATE", 0, "TRAIN.DOWNSAMPLERATE 0"),
    ],
)
def test_bad_setting_is_named(pristine, section, key, value, words):
    cfg = city_settings(pristine)
    cfg.defrost()
    cfg[section][key] = value
    assert words in refused(cfg)


# ---- geometry ------------------------------------------------------------------------------------


def labelled_noise(width, height):
    rng = np.random.default_rng(0)
    picture = noise(rng, width, height)
    return picture, (picture[..., 0] // 14).astype(np.uint8)  # below 19


def geometry(**changes):
    options = {
        "crop": (40, 30),
        "base_size": 64,
        "scale_factor": 16,
        "multi_scale": False,
        "flip": False,
    }
    return TrainingGeometry(**options | changes)


def test_crop_is_exact_and_labels_stay_with_their_pixels():
    picture, labels = labelled_noise(64, 48)
    torch.manual_seed(0)
    for _ in range(10):
        pixels, ids = geometry(flip=True)(Image.fromarray(picture), labels)
        assert pixels.shape == (30, 40, 3)
        np.testing.assert_array_equal(ids, pixels[..., 0] // 14)


def test_small_images_are_padded_right_and_below():
    picture, labels = labelled_noise(32, 40)
    pixels, ids = geometry(crop=(50, 40))(Image.fromarray(picture), labels)
    np.testing.assert_array_equal(pixels[:, :32], picture)
    np.testing.assert_array_equal(ids[:, :32], labels)
    assert (pixels[:, 32:] == 0).all()
    assert (ids[:, 32:] == IGNORE).all()


def test_scaled_crop_equals_a_crop_of_the_whole_scaled_image():
    picture, labels = labelled_noise(100, 70)
    image = Image.fromarray(picture)
    for base_size, size in ((77, (77, 54)), (173, (173, 121))):
        # Scales of 0.5 + 5/10 alone: the long side becomes the base size.
        scaled = np.array(image.resize(size, Image.Resampling.BILINEAR)).astype(int)
        nearest = np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        crop = geometry(multi_scale=True, base_size=2 * base_size, scale_factor=0)
        torch.manual_seed(3)
        for _ in range(5):
            pixels, ids = crop(image, labels)
            differences = [
                np.abs(scaled[y : y + 30, x : x + 40] - pixels).max()
                + 255 * (nearest[y : y + 30, x : x + 40] != ids).any()
                for y in range(size[1] - 29)
                for x in range(size[0] - 39)
            ]
            assert min(differences) <= 1


def test_scales_are_those_of_the_published_runs():
    whole = geometry(crop=(300, 300), multi_scale=True, base_size=100)
    picture, labels = labelled_noise(60, 30)
    torch.manual_seed(0)
    sizes = set()
    for _ in range(200):
        _, ids = whole(Image.fromarray(picture), labels)
        rows, columns = (np.flatnonzero((ids != IGNORE).any(axis)) for axis in (1, 0))
        sizes.add((columns[-1] + 1, rows[-1] + 1))
    assert sizes == {(50 + 10 * k, 25 + 5 * k) for k in range(17)}


def test_labels_may_have_another_resolution():
    picture, labels = labelled_noise(64, 48)
    pixels, ids = geometry(label_scale=0.5)(Image.fromarray(picture), labels)
    assert pixels.shape == (30, 40, 3)
    assert ids.shape == (15, 20)


@pytest.mark.parametrize(("rate", "size"), [(4, (12, 24)), (1, (48, 96)), (0.5, (96, 192))])
def test_downsample_rate_divides_the_labels(pristine, rate, size):
    """As in the published code: labels at a quarter of the crop have rate 4."""
    cfg = city_settings(pristine)
    cfg.defrost()
    cfg.TRAIN.DOWNSAMPLERATE = rate
    image, labels = get_seg_dataset(cfg, "train")[0]
    assert (image.shape, labels.shape) == ((3, 48, 96), size)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((40, 30), (slice(9, 39), slice(12, 52))),
        ((41, 31), (slice(8, 39), slice(12, 53))),  # halves to the even number, as published
        ((64, 48), (slice(0, 48), slice(0, 64))),
        ((100, 20), (slice(14, 34), slice(0, 64))),  # what is smaller stays whole
    ],
)
def test_centre_crop_cuts_the_middle(size, window):
    picture, labels = labelled_noise(64, 48)
    pixels, ids = CentreCrop(size, base_size=64)(Image.fromarray(picture), labels)
    np.testing.assert_array_equal(pixels, picture[window])
    np.testing.assert_array_equal(ids, labels[window])


@pytest.mark.parametrize("base_size", [96, 33])
def test_centre_crop_is_of_the_image_at_scale_1(base_size):
    """The resized image is the one that a prediction without a crop would see."""
    picture, labels = labelled_noise(64, 48)
    crop = CentreCrop((20, 10), base_size)
    pixels, ids = crop(Image.fromarray(picture), labels)
    seen = []

    def forward(images):
        seen.append(images)
        return images

    images = torch.tensor(picture).permute(2, 0, 1)[None].double()
    predict(forward, images, window=(999, 999), base_size=base_size)
    whole = seen[0][0].permute(1, 2, 0).numpy()
    top, left = (
        round((side - part) / 2) for side, part in zip(whole.shape[:2], (10, 20), strict=True)
    )
    assert np.abs(whole[top : top + 10, left : left + 20] - pixels).max() <= 0.5 + 1e-4
    nearest = Image.fromarray(labels).resize(whole.shape[1::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(ids, np.array(nearest)[top : top + 10, left : left + 20])


def test_centre_crop_test_items(pristine):
    """Of the evaluated splits, with and without labels; pictures are cut like items."""
    test = {"CENTER_CROP_TEST": True, "IMAGE_SIZE": [60, 40], "BASE_SIZE": 128}
    window = (slice(12, 52), slice(34, 94))

    def dataset(split, crop=True, **lists):
        cfg = city_settings(pristine, **lists)
        cfg.defrost()
        cfg.TEST.update(test | {"CENTER_CROP_TEST": crop})
        return get_seg_dataset(cfg, split)

    for lists in ({}, {"TEST_SET": "list/cityscapes/test.lst"}):
        cropped, whole = dataset("test", **lists), dataset("test", crop=False, **lists)
        (image, labels), (full_image, full_labels) = cropped[1], whole[1]
        assert torch.equal(image, full_image[(slice(None), *window)])
        assert torch.equal(labels, full_labels[window])
        np.testing.assert_array_equal(cropped.picture(1), whole.picture(1)[window])
    assert torch.equal(dataset("valid")[1][0], dataset("test")[1][0])
    assert dataset("train")[0][0].shape == (3, 48, 96)


# ---- digit scenes --------------------------------------------------------------------------------

SCENES = {
    "DATASET": {"NUM_CLASSES": 11},
    "TRAIN": {"IMAGE_SIZE": [64, 64], "MULTI_SCALE": False, "FLIP": False},
}


@pytest.fixture(scope="module")
def scenes():
    return get_seg_dataset(settings("digit_scenes", **SCENES), "test")


def test_scene_items(scenes):
    assert len(scenes) == N_SCENES["test"] == 200
    assert (scenes.name(0), scenes.facts) == ("test_0000", DIGIT_SCENES)
    image, labels = scenes[7]
    assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
    assert (labels.shape, labels.dtype) == ((64, 64), torch.int64)
    picture, ids = render_scene("test", 7, (64, 64))
    np.testing.assert_array_equal(scenes.picture(7), picture)
    np.testing.assert_array_equal(labels, ids)
    expected = (picture / 255 - DIGIT_SCENES.mean) / DIGIT_SCENES.std
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)


def test_scenes_are_varied_and_balanced():
    drawn = [render_scene("test", i, (64, 64)) for i in range(N_SCENES["test"])]
    pixels = np.concatenate([labels.ravel() for _, labels in drawn])
    share = np.bincount(pixels, minlength=11) / pixels.size
    assert 0.8 < share[0] < 0.92
    assert share[1:].min() > 0.5 * share[1:].max()
    kinds = [len(np.unique(labels)) - 1 for _, labels in drawn]
    assert min(kinds) >= 1
    assert np.mean(kinds) > 2.5
    # Ink is brighter than what is around it, in every scene.
    for image, labels in drawn:
        brightness = image.max(axis=2)
        assert brightness[labels > 0].mean() > brightness[labels == 0].mean() + 50


def test_scene_is_a_function_of_split_and_number():
    first = render_scene("train", 3, (48, 40))
    state = torch.get_rng_state()
    again = render_scene("train", 3, (48, 40))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert first[0].shape == (40, 48, 3)
    assert not np.array_equal(first[0], render_scene("train", 4, (48, 40))[0])
    assert not np.array_equal(first[0], render_scene("test", 3, (48, 40))[0])


def test_scenes_use_the_digits_of_their_split_only(monkeypatch):
    """Test scenes do not change with the training digits, nor the other way round, and so on."""
    from mdeq_vision.datasets import digit_scenes

    splits = split_digits()
    for split, other in (("test", "train"), ("train", "valid"), ("valid", "test")):
        before = render_scene(split, 0, (64, 64))[1]
        monkeypatch.setattr(digit_scenes, "split_digits", lambda s=split: {s: splits[s]})
        np.testing.assert_array_equal(before, render_scene(split, 0, (64, 64))[1])
        with pytest.raises(KeyError):
            render_scene(other, 0, (64, 64))
        monkeypatch.undo()


def test_scenes_too_small_to_read_are_refused():
    train = SCENES["TRAIN"] | {"IMAGE_SIZE": [64, 24]}
    cfg = settings("digit_scenes", DATASET={"NUM_CLASSES": 11}, TRAIN=train)
    assert "at least 32x32" in refused(cfg)
    assert "digit_scenes has 11 classes" in refused(settings("digit_scenes"))
