"""Writes small image data sets in the true formats: CIFAR-10, ImageNet, Cityscapes.

The pictures are noise; every file is the same on every run. ``settings`` has the configuration
that reads them.
"""

import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from mdeq_vision.config import config
from mdeq_vision.datasets.cityscapes_lists import write_lists


def settings(dataset: str, root: str | Path = "", **sections: dict) -> CfgNode:
    """The defaults with DATASET.DATASET, DATASET.ROOT and e.g. ``TRAIN={"FLIP": False}``."""
    cfg = config.clone()
    cfg.defrost()
    cfg.DATASET.DATASET, cfg.DATASET.ROOT, cfg.DATASET.TEST_SET = dataset, str(root), "val"
    for section, values in sections.items():
        for key, value in values.items():
            assert key in cfg[section], f"{section}.{key}"
            cfg[section][key] = value
    cfg.freeze()
    return cfg


def noise(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A picture (height, width, 3), uint8: coloured patches of 4x4 pixels."""
    patches = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return patches.repeat(4, 0).repeat(4, 1)[:height, :width]


# ---- CIFAR-10 ------------------------------------------------------------------------------------


def write_cifar10(root: str | Path, per_batch: int = 20) -> Path:
    """ROOT/cifar-10-batches-py with five training batches and a test batch of that many images."""
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        data = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [i % 10 for i in rng.permutation(per_batch).tolist()]
        (folder / name).write_bytes(python2_batch(data, labels))
    meta = {"label_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 pickled it: protocol 2, byte strings, the old names of NumPy's parts."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    rebuild = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    rebuild += integer(0) + b"\x85" + string(b"b") + b"\x87R"  # (ndarray, (0,), 'b')
    dtype = name("numpy", "dtype") + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    shape = integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
    state = b"(" + integer(1) + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"
    values = {
        b"data": rebuild + state,
        b"labels": b"](" + b"".join(map(integer, labels)) + b"e",
        b"batch_label": string(b"a batch"),
        b"filenames": b"](" + b"".join(string(b"%d.png" % i) for i in range(len(labels))) + b"e",
    }
    items = b"".join(string(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


# ---- ImageNet ------------------------------------------------------------------------------------


def write_imagenet(
    root: str | Path, classes: int = 3, per_class: int = 4, size: tuple[int, int] = (80, 60)
) -> Path:
    """ROOT/images/{train,val}/nXXXXXXXX/*.JPEG; ``size`` is (width, height)."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for number in range(classes):
            wnid = f"n{1440764 + number:08d}"
            folder = Path(root) / "images" / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                stem = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{number:04d}{i:04d}"
                Image.fromarray(noise(rng, *size)).save(folder / f"{stem}.JPEG")
    return Path(root)


# ---- Cityscapes ----------------------------------------------------------------------------------

LABEL_IDS = (*range(34), 255)  # licence plates have id -1, which 8-bit files hold as 255


def write_cityscapes(
    root: str | Path,
    n_train: int = 4,
    n_val: int = 2,
    n_test: int = 2,
    size: tuple[int, int] = (128, 64),
) -> Path:
    """ROOT/cityscapes/{leftImg8bit,gtFine} and ROOT/list/cityscapes; ``size`` is (width, height).

    Labels are patches with any of the official label ids; the test images have none.
    """
    rng = np.random.default_rng(2)
    width, height = size
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt",), "test": ("berlin",)}
    for split, count in (("train", n_train), ("val", n_val), ("test", n_test)):
        for i in range(count):
            city = cities[split][i % len(cities[split])]
            stem = f"{city}_{i:06d}_000019"
            picture = noise(rng, width, height)
            _save(picture, root, "leftImg8bit", split, city, f"{stem}_leftImg8bit.png")
            if split != "test":
                patches = rng.choice(LABEL_IDS, (-(-height // 8), -(-width // 8)))
                labels = patches.astype(np.uint8).repeat(8, 0).repeat(8, 1)[:height, :width]
                _save(labels, root, "gtFine", split, city, f"{stem}_gtFine_labelIds.png")
    write_lists(root)
    return Path(root)


def _save(pixels: np.ndarray, root: str | Path, kind: str, split: str, city: str, name: str):
    folder = Path(root) / "cityscapes" / kind / split / city
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
