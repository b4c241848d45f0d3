"""Weights as safetensors: nothing lost, nothing silently wrong, no name left out."""

import contextlib
import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export_weights import export_file, export_weights
from lib.errors import InputError
from lib.runs.checkpoint import load, load_weights, read_state, save_atomic

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
          torch.int64, torch.int32, torch.uint8, torch.bool]  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # tied: the state dict has both names
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refusal(action, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(a, b):
    """Whether two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and bits(a[name]) == bits(b[name])
        for name in a
    )


def bits(value):
    return value.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_round_trip_into_a_model(path, model, suffix):
    path = path.with_suffix(suffix)
    export_weights(model.state_dict(), path)
    assert same(read_state(path), model.state_dict())
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    load_weights(other, path)
    assert same(other.state_dict(), model.state_dict())
    assert os.listdir(path.parent) == [path.name]


def test_tied_weights_keep_both_names_for_any_reader(path, model):
    export_weights(model.state_dict(), path)
    found = safetensors.torch.load_file(path)
    assert same(found, dict(model.state_dict()))


@settings(max_examples=50, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.booleans()),
        max_size=4,
    )
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_any_state_dict(tmp_path_factory, suffix, tensors):
    state = {}
    for name, (dtype, shape, transposed) in tensors.items():
        value = torch.randn(shape).to(dtype)
        state[name] = value.mT if transposed and value.dim() > 1 else value
    path = tmp_path_factory.mktemp("any") / f"model{suffix}"
    export_weights(state, path)
    assert same(read_state(path), state)


def test_other_peoples_file_has_no_checksum(path, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path, {"format": "pt", "sha256": "of something else"})
    load_weights(model, path)
    assert same(model.state_dict(), state)


@pytest.mark.parametrize("name", ["weights.pt", "weights"])
def test_content_tells_the_format(path, model, name):
    export_weights(model.state_dict(), path)
    path = path.rename(path.with_name(name))
    assert same(read_state(path), model.state_dict())
    save_atomic({"model": model.state_dict()}, path.with_name("x.safetensors"))
    assert same(read_state(path.with_name("x.safetensors")), model.state_dict())


# --- Damage -----------------------------------------------------------------------------------


def loads_or_refuses(path, content, state):
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert same(load(path), state)


def test_every_truncation_and_a_flipped_bit_of_every_byte(path):
    """Another bit from byte to byte, so that each of the eight is flipped in the header too."""
    state = {"a": torch.randn(3), "b": torch.tensor(2), "c": torch.randn(2).bfloat16()}
    export_weights(state, path)
    good = path.read_bytes()
    for end in range(len(good)):
        loads_or_refuses(path, good[:end], state)
    for at in range(len(good)):
        content = bytearray(good)
        content[at] ^= 1 << at % 8
        loads_or_refuses(path, content, state)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=2))
def test_several_changed_bytes(tmp_path_factory, changes):
    """Anywhere but in the checksum's name and form: without both, the file is as another's."""
    path = tmp_path_factory.mktemp("damage") / "model.safetensors"
    state = {"a": torch.arange(40.0), "b": torch.ones(40)}
    export_weights(state, path)
    content = bytearray(path.read_bytes())
    start = content.index(b"}")
    for where, byte in changes:
        content[start + int(where * (len(content) - start))] = byte
    loads_or_refuses(path, content, state)


@pytest.mark.parametrize("other", ["checksum's name", "checksum's form", "its digits"])
def test_checksum_that_is_damaged_itself(path, other):
    export_weights({"a": torch.ones(3)}, path)
    content = path.read_bytes()
    if other == "its digits":
        at = content.index(b"of the tensors: ") + 20
        content = content[:at] + (b"x") + content[at + 1 :]
    else:
        word = b"tensors.sha256" if other == "checksum's name" else b"sha256 of"
        content = content.replace(word, b"X" + word[1:])[:-1] + b"\x01"  # and the data
    path.write_bytes(content)
    assert "damaged" in refusal(load, path)


@pytest.mark.parametrize("length", [2**63, 10**9, 100, 0])
def test_header_of_another_length(path, length):
    export_weights({"a": torch.ones(30)}, path)
    content = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    refusal(load, path)


@pytest.mark.parametrize("header", [[], {"a": 3}, {"__metadata__": 3}, {"__metadata__": {"a": 3}}])
def test_header_of_another_structure(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refusal(load, path)


# --- Exporting --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "model", "model.safetensors.gz"])
def test_unknown_suffix(path, model, name):
    message = refusal(export_weights, model.state_dict(), path.with_name(name))
    assert name in message
    assert ".safetensors, .pt" in message
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("odd", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)])
def test_odd_tensors_are_not_exported(path, suffix, odd):
    state = {"fine": torch.ones(2), "odd": odd}
    assert "odd" in refusal(export_weights, state, path.with_suffix(suffix))
    assert os.listdir(path.parent) == []


def test_failed_export_leaves_the_old_file(path, monkeypatch, model):
    export_weights({"a": torch.ones(2)}, path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export_weights(model.state_dict(), path)
    monkeypatch.undo()
    assert same(load(path), {"a": torch.ones(2)})
    assert os.listdir(path.parent) == [path.name]


def test_file_onto_itself(path, model):
    export_weights(model.state_dict(), path)
    before = path.read_bytes()
    assert "is the file that is read" in refusal(export_file, path, path)
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_not_exported(path):
    source = path.with_suffix(".pt")
    save_atomic({"a": torch.ones(2), "b": torch.tensor([1, torch.nan])}, source)
    assert refusal(export_file, source, path).endswith("not finite: b")
    assert not path.exists()


def test_state_dict_without_tensors_is_not_exported(path):
    save_atomic({"model": {}}, path.with_suffix(".pt"))
    assert "no weights" in refusal(export_file, path.with_suffix(".pt"), path)
