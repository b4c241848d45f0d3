"""CIFAR-10, ImageNet and the digits: what items are, and what bad files say."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import python2_batch, settings, write_cifar10, write_imagenet
from lib.errors import InputError
from mdeq_vision.datasets import CLASSIFICATION, get_cls_dataset
from mdeq_vision.datasets.digits import split_digits
from mdeq_vision.datasets.image_reading import read_rgb


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- CIFAR-10 ------------------------------------------------------------------------------------

CIFAR = {"MODEL": {"IMAGE_SIZE": [32, 32], "NUM_CLASSES": 10}}


@pytest.fixture
def cifar(tmp_path):
    return write_cifar10(tmp_path, per_batch=10)


def test_cifar10_items_are_the_normalised_pixels_of_all_batches(cifar, tmp_path):
    with open(cifar / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="latin1")
    train, test = (get_cls_dataset(settings("cifar10", tmp_path, **CIFAR), s) for s in SPLITS)
    assert (len(train), len(test)) == (50, 10)
    assert train.classes == test.classes
    assert (train.classes[0], train.classes[9]) == ("airplane", "truck")
    image, label = test[3]
    assert isinstance(label, int)
    assert label == batch["labels"][3]
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    pixels = torch.tensor(batch["data"][3].reshape(3, 32, 32)) / 255
    torch.testing.assert_close(image, (pixels - mean) / std)


SPLITS = ("train", "test")


def test_cifar10_augmentation_is_a_crop_of_the_padded_image_and_a_flip(cifar, tmp_path):
    still = settings("cifar10", tmp_path, DATASET={"AUGMENT": False}, **CIFAR)
    moved = get_cls_dataset(settings("cifar10", tmp_path, **CIFAR), "train")
    still = get_cls_dataset(still, "train")
    torch.testing.assert_close(still[0][0], still[0][0])
    torch.manual_seed(0)
    seen = set()
    # Padding is black before it is normalised.
    black = (-torch.tensor([0.4914, 0.4822, 0.4465]) / torch.tensor([0.2023, 0.1994, 0.2010]))[0]
    padded = torch.nn.functional.pad(still[0][0][0], (4,) * 4, value=black.item())
    for _ in range(20):
        image = moved[0][0][0]
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.allclose(
                image.flip(-1) if flip else image, padded[top : top + 32, left : left + 32]
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 10
    assert {flip for *_, flip in seen} == {False, True}


def test_cifar10_images_take_the_size_that_the_model_has(cifar, tmp_path):
    model = {"IMAGE_SIZE": [16, 24], "NUM_CLASSES": 10}
    train = get_cls_dataset(settings("cifar10", tmp_path, MODEL=model), "train")
    assert train[0][0].shape == (3, 24, 16)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar10_batches_rewritten_by_python_3_are_read(cifar, tmp_path, protocol, key):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    batch = {key("data"): data, key("labels"): list(np.arange(10)), key("batch_label"): b"one"}
    (cifar / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    test = get_cls_dataset(settings("cifar10", tmp_path, **CIFAR), "test")
    assert test.labels == list(range(10))
    np.testing.assert_array_equal(test.images[4].transpose(2, 0, 1).ravel(), data[4])


class Evil:
    def __reduce__(self):
        return os.system, ("touch should_not_exist",)


GOOD = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"<html>moved</html>", "cannot be read"),
        (python2_batch(GOOD, [1, 2])[:3000], "cannot be read"),
        (pickle.dumps(Evil()), "asks for posix.system, which is not data"),
        (pickle.dumps({"data": GOOD}), "'labels'"),
        (pickle.dumps([GOOD]), "is not a CIFAR-10 batch"),
        (python2_batch(GOOD, [1]), "shape (2, 3072) for 1 labels"),
        (python2_batch(GOOD[:, :3000], [1, 2]), "shape (2, 3000)"),
        (python2_batch(GOOD, [1, 10]), "labels beyond 0..9"),
    ],
)
def test_bad_cifar10_file_is_named(cifar, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = cifar / "data_batch_3"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        get_cls_dataset(settings("cifar10", tmp_path, **CIFAR), "train")
    line = one_line(error)
    assert message in line
    assert str(path) in line
    assert "bash get_data.sh cifar10" in line
    assert not (tmp_path / "should_not_exist").exists()


# ---- ImageNet ------------------------------------------------------------------------------------

SMALL = {"MODEL": {"IMAGE_SIZE": [28, 28], "NUM_CLASSES": 3}}


@pytest.fixture
def imagenet(tmp_path):
    return write_imagenet(tmp_path, classes=3, per_class=2, size=(64, 48))


def test_imagenet_training_crops_and_validation_cuts_the_centre(imagenet):
    train, test = (get_cls_dataset(settings("imagenet", imagenet, **SMALL), s) for s in SPLITS)
    assert (len(train), len(test)) == (6, 6)
    assert train.classes == ["n01440764", "n01440765", "n01440766"]
    assert [label for _, label in test] == [0, 0, 1, 1, 2, 2]
    assert train[0][0].shape == test[0][0].shape == (3, 28, 28)
    assert not torch.equal(train[0][0], train[0][0])
    assert torch.equal(test[0][0], test[0][0])
    # The shorter side becomes 28 / 0.875 = 32, the longer 42; the centre is 28x28.
    picture = read_rgb(test.samples[0][0]).resize((42, 32), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.array(picture.crop((7, 2, 35, 30)))).permute(2, 0, 1) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(test[0][0], (pixels - mean) / std)


def test_imagenet_without_augmentation(imagenet):
    """A training image is then what validation would see of it, every time."""
    cfg = settings("imagenet", imagenet, DATASET={"AUGMENT": False}, **SMALL)
    dataset = get_cls_dataset(cfg, "train")
    assert torch.equal(dataset[0][0], dataset[0][0])
    own = settings("imagenet", imagenet, **SMALL)
    own.defrost()
    own.DATASET.TRAIN_SET, own.DATASET.TEST_SET = "val", "train"
    assert torch.equal(dataset[0][0], get_cls_dataset(own, "test")[0][0])


def test_imagenet_images_are_square(imagenet):
    cfg = settings("imagenet", imagenet, MODEL=SMALL["MODEL"] | {"IMAGE_SIZE": [32, 24]})
    with pytest.raises(InputError, match=r"MODEL.IMAGE_SIZE is \[32, 24\], but imagenet's are sq"):
        get_cls_dataset(cfg, "train")


def test_imagenet_folder_without_images_in_its_path(imagenet):
    (imagenet / "images" / "val").rename(imagenet / "val")
    cfg = settings("imagenet", imagenet, **SMALL)
    assert len(get_cls_dataset(cfg, "train")) == len(get_cls_dataset(cfg, "test")) == 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "transparent palette"])
def test_images_of_other_kinds_become_rgb(tmp_path, mode):
    colour = Image.new("RGB", (8, 6), (204, 204, 204))  # also a colour of the palette
    if mode == "transparent palette":
        image = colour.convert("P")
        image.info["transparency"] = bytes(256)
    else:
        image = colour.convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = np.array(read_rgb(path))
    assert rgb.shape == (6, 8, 3)
    if mode != "1":
        assert np.abs(rgb.astype(int) - 204).max() <= 2


def truncated(path):
    path.write_bytes(path.read_bytes()[:400])


def garbled(path):
    path.write_bytes(b"\xff\xd8" + bytes(500))


def sixteen_bits(path):
    path.unlink()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(path, format="PNG")


@pytest.mark.parametrize("damage", [truncated, garbled, sixteen_bits, os.unlink])
def test_damaged_image_is_named(imagenet, damage):
    dataset = get_cls_dataset(settings("imagenet", imagenet, **SMALL), "train")
    path = imagenet / "images" / "train" / "n01440765" / "n01440765_1.JPEG"
    damage(path)
    with pytest.raises(InputError) as error:
        dataset[3]
    assert str(path) in one_line(error)


def test_classes_that_do_not_fit_are_refused(imagenet):
    few = settings("imagenet", imagenet, MODEL={"IMAGE_SIZE": [28, 28], "NUM_CLASSES": 2})
    with pytest.raises(InputError, match="NUM_CLASSES is 2, but imagenet has 3 classes"):
        get_cls_dataset(few, "train")
    (imagenet / "images" / "val" / "n01440766").rename(imagenet / "images" / "val" / "n09")
    for split in SPLITS:
        with pytest.raises(InputError, match=r"same class folders, but n01440766 .* \(2 such\)"):
            get_cls_dataset(settings("imagenet", imagenet, **SMALL), split)


def test_missing_and_empty_image_folders_are_named(imagenet, tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"image folder .*nowhere.train does not exist"):
        get_cls_dataset(settings("imagenet", nowhere, **SMALL), "train")
    (imagenet / "images" / "train" / "n00000000").mkdir()
    with pytest.raises(InputError, match=r"is not complete.*n00000000") as error:
        get_cls_dataset(settings("imagenet", imagenet, **SMALL), "train")
    one_line(error)


# ---- digits --------------------------------------------------------------------------------------

DIGITS = {"MODEL": {"IMAGE_SIZE": [16, 16], "NUM_CLASSES": 10}}


def test_digits_are_split_by_class_and_kept_apart():
    splits = split_digits()
    counts = {name: np.bincount(digits.labels) for name, digits in splits.items()}
    assert sum(counts.values()).sum() == 1797
    for name, wanted in (("train", 0.7), ("test", 0.2), ("valid", 0.1)):
        assert (abs(counts[name] / sum(counts.values()) - wanted) < 0.01).all()
    train = splits["train"]
    assert train.images.min() == 0
    assert train.images.max() == 1
    images = [{image.tobytes() for image in digits.images} for digits in splits.values()]
    assert len(set.union(*images)) == sum(map(len, images))
    with pytest.raises(ValueError, match="read-only"):
        train.images[0] = 0


def test_digit_items():
    train, test = (get_cls_dataset(settings("digits", **DIGITS), split) for split in SPLITS)
    image, label = test[5]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert torch.equal(image[0], image[2])
    assert label == split_digits()["test"].labels[5]
    # Inside, that is plain bilinear resizing; at the rim, the black paper around shows.
    source = torch.tensor(split_digits()["test"].images[5])[None, None]
    resized = torch.nn.functional.interpolate(source, (16, 16), mode="bilinear")[0, 0]
    torch.testing.assert_close(image[0, 1:-1, 1:-1] * 0.31 + 0.3, resized[1:-1, 1:-1])
    assert torch.equal(test[5][0], image)
    assert not torch.equal(train[5][0], train[5][0])
    still = get_cls_dataset(settings("digits", DATASET={"AUGMENT": False}, **DIGITS), "train")
    assert torch.equal(still[5][0], still[5][0])
    # Moved only a little: the digit that it is nearest to is still the same one.
    images = torch.stack([still[i][0] for i in range(200)])
    torch.manual_seed(0)
    distances = torch.stack([(images - train[i][0]).square().sum((1, 2, 3)) for i in range(200)])
    labels = torch.tensor(still.labels[:200])
    assert (labels[distances.argmin(dim=1)] == labels).float().mean() > 0.85


# ---- all -----------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_those_that_are():
    with pytest.raises(InputError, match=f"'mnist'.*choose {', '.join(CLASSIFICATION)}"):
        get_cls_dataset(settings("mnist"), "train")
    with pytest.raises(InputError, match="split 'val': choose 'train' or 'valid' or 'test'"):
        get_cls_dataset(settings("digits", **DIGITS), "val")


def test_validation_images(tmp_path):
    """The digits' own, without random changes; of a published data set those of the test."""
    valid = get_cls_dataset(settings("digits", **DIGITS), "valid")
    assert valid.labels == split_digits()["valid"].labels.tolist()
    assert torch.equal(valid[5][0], valid[5][0])
    write_cifar10(tmp_path)
    cfg = settings("cifar10", tmp_path, **CIFAR)
    valid, test = (get_cls_dataset(cfg, split) for split in ("valid", "test"))
    np.testing.assert_array_equal(valid.images, test.images)
