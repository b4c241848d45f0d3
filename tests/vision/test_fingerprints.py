"""What tells the data of a run apart, and refuses batches before training."""

import shutil

import numpy as np
import pytest
from PIL import Image

from image_files import settings, write_cifar10, write_cityscapes, write_imagenet
from lib.errors import InputError
from mdeq_vision.datasets import fingerprint, get_cls_dataset, get_seg_dataset

WRITERS = {"cifar10": write_cifar10, "imagenet": write_imagenet, "cityscapes": write_cityscapes}


def read(dataset, root):
    if dataset == "cityscapes":
        lists = {"TRAIN_SET": "list/cityscapes/train.lst", "TEST_SET": "list/cityscapes/val.lst"}
        cfg = settings(dataset, root, DATASET=lists | {"NUM_CLASSES": 19})
        return fingerprint(get_seg_dataset(cfg, "train"))
    return fingerprint(
        get_cls_dataset(settings(dataset, root, MODEL={"IMAGE_SIZE": [32, 32]}), "train")
    )


def change(dataset, root):
    """Change what a run reads, and leave the number of images."""
    if dataset == "cifar10":
        file = root / "cifar-10-batches-py" / "data_batch_3"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # a pixel
        file.write_bytes(content)
    elif dataset == "imagenet":
        image = next((root / "images/train").glob("*/*_2.JPEG"))
        image.rename(image.with_stem("another"))
    else:
        file = root / "list/cityscapes/train.lst"
        first, *rest = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*rest, first]))


@pytest.mark.parametrize("dataset", WRITERS)
def test_a_fingerprint_is_of_the_content(dataset, tmp_path):
    """And not of the place."""
    WRITERS[dataset](tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    found = read(dataset, tmp_path / "one")
    assert read(dataset, tmp_path / "two") == found
    change(dataset, tmp_path / "two")
    other = read(dataset, tmp_path / "two")
    assert other != found
    assert other.split()[0] == found.split()[0]


def test_a_name_that_is_not_utf_8(tmp_path):
    write_imagenet(tmp_path)
    before = read("imagenet", tmp_path)
    image = next((tmp_path / "images/train").glob("*/*_2.JPEG"))
    image.rename(image.with_name("\udcff.JPEG"))
    assert read("imagenet", tmp_path) != before


def test_a_fingerprint_of_digits():
    cfg = settings("digits", MODEL={"IMAGE_SIZE": [8, 8]})
    train, test = (fingerprint(get_cls_dataset(cfg, split)) for split in ("train", "test"))
    assert train != test
    assert fingerprint(get_cls_dataset(cfg, "train")) == train


@pytest.mark.parametrize("cropped", [False, True])
def test_test_images_of_several_sizes_need_batches_of_one(tmp_path, cropped):
    write_cityscapes(tmp_path)
    images = sorted((tmp_path / "cityscapes").rglob("val/**/*_leftImg8bit.png"))
    width, height = Image.open(images[0]).size
    Image.fromarray(np.zeros((height, 2 * width, 3), np.uint8)).save(images[-1])
    tests = {"CENTER_CROP_TEST": cropped, "IMAGE_SIZE": [8, 8], "BASE_SIZE": 64}
    lists = {"TEST_SET": "list/cityscapes/val.lst", "NUM_CLASSES": 19}

    def check(batch, samples=0):
        test = tests | {"BATCH_SIZE_PER_GPU": batch, "NUM_SAMPLES": samples}
        cfg = settings("cityscapes", tmp_path, DATASET=lists, TEST=test)
        get_seg_dataset(cfg, "test").check_batches(cfg)

    check(1)
    check(2, samples=len(images) - 1)
    if cropped:  # all alike
        check(2)
        return
    words = (
        rf"^TEST.BATCH_SIZE_PER_GPU is 2, but .* 2 sizes \(.*{2 * width}x{height}\): set it to 1$"
    )
    with pytest.raises(InputError, match=words):
        check(2)
