"""The loader: what a batch holds depends on seed, epoch and number alone."""

import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from image_files import settings, write_cifar10, write_imagenet
from lib.errors import InputError
from mdeq_vision.datasets import get_cls_dataset, make_loader, n_batches, on_device
from mdeq_vision.datasets.torchvision_import import import_torchvision


class Numbers(Dataset):
    """Item i is (random number, i)."""

    def __init__(self, n: int = 10):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index):
        if index == 13:
            raise InputError("number 13 cannot be read: replace it")
        return torch.rand(2), index


def load(dataset=None, **changes):
    options = {"batch_size": 4, "seed": 1, "epoch": 0, "shuffle": True, "drop_last": False}
    return make_loader(Numbers() if dataset is None else dataset, **options | changes)


def indices(loader) -> list[list[int]]:
    return [batch[1].tolist() for batch in loader]


def flat(loader) -> dict[int, tuple[float, ...]]:
    """The random numbers of each sample."""
    return {
        index: tuple(value.tolist())
        for values, numbers in loader
        for value, index in zip(values, numbers.tolist(), strict=True)
    }


def test_batches_are_cut_from_a_permutation_of_seed_and_epoch():
    first = indices(load())
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(itertools.chain(*first)) == list(range(10))
    assert first == indices(load())
    assert first != indices(load(seed=2))
    assert first != indices(load(epoch=1))
    assert indices(load(drop_last=True)) == first[:2]
    assert indices(load(shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_iterating_again_gives_the_same_and_len_is_the_number_of_batches():
    loader = load(start=1)
    assert len(loader) == 2
    assert flat(loader) == flat(loader)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch():
    whole = list(load(epoch=3))
    rest = list(load(epoch=3, start=2))
    assert len(rest) == 1
    for a, b in zip(whole[2], rest[0], strict=True):
        assert torch.equal(a, b)
    assert list(load(start=3)) == []


def test_percent_keeps_the_first_batches():
    assert indices(load(percent=0.7)) == indices(load())[:2]
    assert len(load(percent=0.01)) == 1
    assert n_batches(100, 10, drop_last=True, percent=0.55) == 5


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch(world_size):
    whole = indices(load())
    shares = [indices(load(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for k, batch in enumerate(whole):
        assert [i for share in shares if k < len(share) for i in share[k]] == batch
    sizes = [len(share[0]) for share in shares]
    assert sizes == ([2, 2] if world_size == 2 else [2, 1, 1])
    # The last batch has two samples: with three ranks, the last one goes without.
    assert [len(share) for share in shares] == [3, 3, 2][:world_size]


def test_random_numbers_of_a_sample_depend_on_nothing_else():
    alone = flat(load())
    assert len(set(alone.values())) == 10
    assert alone == flat(load(shuffle=False, batch_size=3))
    assert alone == flat(load(rank=0, world_size=2)) | flat(load(rank=1, world_size=2))
    assert alone == flat(load(workers=2))
    for other in (load(seed=2), load(epoch=1)):
        assert not set(alone.values()) & set(flat(other).values())


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generator_is_left_alone(workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(load(workers=workers))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_sample_arrives_as_it_was_raised(workers):
    loader = load(Numbers(14), shuffle=False, workers=workers)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    with pytest.raises(InputError) as error:
        next(batches)
    assert str(error.value) == "number 13 cannot be read: replace it"


def test_images_of_different_sizes_are_refused_with_the_way_out():
    class Sizes(Numbers):
        def __getitem__(self, index):
            return torch.zeros(3, 8, 8 + index), index

    with pytest.raises(InputError, match=r"different sizes \(10x8, 11x8, 8x8, 9x8\): set the"):
        list(load(Sizes(), shuffle=False))


@pytest.mark.parametrize(
    ("n", "changes", "message"),
    [
        (3, {"drop_last": True}, "the data set has 3 samples, fewer than one batch of 4"),
        (0, {}, "the data set is empty"),
        (9, {"batch_size": 0}, "batch size 0"),
        (9, {"percent": 0.0}, "PERCENT 0.0"),
        (9, {"percent": 1.5}, "PERCENT 1.5"),
        (9, {"start": 4}, "cannot start at batch 4: the epoch has 3 batches"),
        (9, {"rank": 2, "world_size": 2}, "rank 2 is not below the number of processes, 2"),
        (9, {"world_size": 5}, "a batch of 4 cannot be shared by 5 processes"),
    ],
)
def test_misuse_is_refused(n, changes, message):
    with pytest.raises(InputError, match=message):
        load(Numbers(n), **changes)


# ---- real data sets and other processes ----------------------------------------------------------


def test_augmented_images_are_the_same_with_and_without_workers(tmp_path):
    write_cifar10(tmp_path, per_batch=4)
    model = {"IMAGE_SIZE": [32, 32], "NUM_CLASSES": 10}
    train = get_cls_dataset(settings("cifar10", tmp_path, MODEL=model), "train")
    for alone, with_workers in zip(load(train), load(train, workers=2), strict=True):
        assert torch.equal(alone[0], with_workers[0])
        assert torch.equal(alone[1], with_workers[1])


FROM_NOTHING = """
import pickle, sys, torch
before = (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads())
import mdeq_vision, mdeq_vision.config, mdeq_vision.datasets, mdeq_vision.transfer
import mdeq_vision.schedules
after = (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads())
assert before == after
assert mdeq_vision.config.config.MODEL.EXTRA == {}
assert not {"torchvision", "sklearn"} & set(sys.modules)
with open(sys.argv[1], "rb") as file:
    torch.save(pickle.load(file)[0], sys.argv[2])
"""


def test_a_process_that_starts_from_nothing(tmp_path):
    """Importing the package is light and changes nothing; a data set travels there.

    As to workers that are spawned: torchvision must be importable there when it is needed.
    """
    write_imagenet(tmp_path, classes=1, per_class=1)
    model = {"IMAGE_SIZE": [16, 16]}
    dataset = get_cls_dataset(settings("imagenet", tmp_path, MODEL=model), "test")
    files = tmp_path / "dataset", tmp_path / "item"
    files[0].write_bytes(pickle.dumps(dataset))
    command = [sys.executable, "-c", FROM_NOTHING, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    image, label = torch.load(files[1])
    assert torch.equal(image, dataset[0][0])
    assert label == 0


def test_torchvision_is_imported_again_and_again():
    assert import_torchvision() is import_torchvision()
    assert import_torchvision().transforms is sys.modules["torchvision.transforms"]


# ---- to the device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_on_device_are_the_same_batches_in_the_same_order(device):
    expected = list(load())
    found = list(on_device(load(pin_memory=device == "cuda"), torch.device(device)))
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        assert {part.device.type for part in a} == {device}
        assert all(torch.equal(x.cpu(), y) for x, y in zip(a, b, strict=True))


def test_on_device_of_no_batch_and_of_an_error():
    assert list(on_device([], torch.device("cpu"))) == []
    with pytest.raises(InputError, match="number 13"):
        list(on_device(load(Numbers(20)), torch.device("cpu")))
