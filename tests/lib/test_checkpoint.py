"""Files of tensors: never half written, never run, never silently wrong."""

import contextlib
import math
import os
import pickle
import resource
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.errors import InputError
from lib.runs.checkpoint import load, load_state, load_weights, save_atomic, strip_wrappers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def refusal(action, *arguments) -> str:
    """The one-line message with which the action refuses."""
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_weights(model, state):
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- Saving -----------------------------------------------------------------------------------


def test_round_trip(path):
    content = {
        "model": {"weight": torch.randn(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)},
        "step": 7,
        "rate": 0.1,
        "name": "a",
        "random": torch.get_rng_state(),
        "nested": [{"x": (1, None, True)}],
    }
    save_atomic(content, path)
    found = load(path)
    assert torch.equal(found["model"]["weight"], content["model"]["weight"])
    assert torch.equal(found["random"], content["random"])
    assert found["nested"] == content["nested"]
    assert (found["step"], found["rate"], found["name"]) == (7, 0.1, "a")
    assert os.listdir(path.parent) == [path.name]


def test_optimizer_state_round_trip(path, model):
    optimizer = torch.optim.RAdam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    save_atomic(optimizer.state_dict(), path)
    found = load(path)
    assert torch.equal(found["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


class FullDisk:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stage", ["torch.save", "fsync", "replace"])
def test_failed_write_leaves_the_old_file(path, monkeypatch, stage):
    save_atomic({"step": 1}, path)
    content = {"big": torch.zeros(1000), "last": FullDisk() if stage == "torch.save" else 0}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if stage != "torch.save":
        monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="No space left"):
        save_atomic(content, path)
    monkeypatch.undo()
    assert load(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]  # and no temporary file


@pytest.mark.parametrize("floats", [24_900, 25_000, 100_000])
def test_full_disk_is_an_error_that_names_the_file(path, floats):
    """As the system reports it amid a write, which torch hides behind an error of its own."""
    save_atomic({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            save_atomic({"weight": torch.zeros(floats), "bias": torch.zeros(10)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_interrupt_leaves_the_old_file(path, monkeypatch):
    save_atomic({"step": 1}, path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"step": 2}, path)
    assert load(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_saved_file_has_ordinary_permissions(path):
    """Others in a group can read a checkpoint, as any file that torch.save writes."""
    ordinary = path.with_name("ordinary.pt")
    torch.save({}, ordinary)
    save_atomic({}, path)
    assert path.stat().st_mode == ordinary.stat().st_mode


# --- Unreadable files -------------------------------------------------------------------------


def damaged(path, kind):
    save_atomic({"model": {"weight": torch.randn(50, 50)}, "step": 3}, path)
    good = bytearray(path.read_bytes())
    if kind.startswith("truncated"):
        path.write_bytes(good[: int(len(good) * float(kind.split()[1]))])
    elif kind == "zip directory damaged":
        good[-22] ^= 0xFF
        path.write_bytes(good)
    elif kind == "pickle damaged":
        where = good.index(b"weight")
        good[where - 6 : where + 2] = b"\xff" * 8
        path.write_bytes(good)
    else:
        content = {"empty": b"", "text": b"not a checkpoint\n", "noise": bytes(range(256)) * 40}
        path.write_bytes(content[kind])


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated 0.01", "truncated 0.5", "truncated 0.95", "truncated 0.999"),
        *("zip directory damaged", "pickle damaged", "empty", "text", "noise"),
    ],
)
def test_damaged_file(path, kind):
    damaged(path, kind)
    assert str(path) in refusal(load, path)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_in_the_data_is_found(path, seed):
    """Numbers carry no meaning of their own, so only a checksum can find these."""
    weight = torch.randn(64, 64)
    save_atomic({"weight": weight}, path)
    content = bytearray(path.read_bytes())
    start = content.index(weight.numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randint(weight.numel() * 4, (1,), generator=generator).item()
    content[start + offset] ^= 1 << seed % 8
    path.write_bytes(content)
    assert str(path) in refusal(load, path)


@pytest.mark.parametrize("offset", [0, *range(60, 2000, 97)])
def test_any_flipped_bit_in_the_directory_is_found_or_harmless(path, offset):
    """torch leaves uninitialised memory for an entry that the directory calls a folder."""
    weight = torch.arange(64.0)
    save_atomic({"weight": weight}, path)
    good = path.read_bytes()
    offset = good.index(b"PK\x01\x02") + offset % (len(good) - good.index(b"PK\x01\x02"))
    for bit in range(8):
        content = bytearray(good)
        content[offset] ^= 1 << bit
        path.write_bytes(content)
        try:
            found = load(path)
        except InputError:
            continue
        assert torch.equal(found["weight"], weight)


def test_entry_that_the_directory_calls_a_folder(path):
    save_atomic({"weight": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10  # the external attributes begin at byte 38
    path.write_bytes(content)
    assert "damaged" in refusal(load, path)


def rewritten(path, method=zipfile.ZIP_STORED, more=()):
    """Write the entries of the archive anew: no code of ours does, but torch could read it."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries of one name
        for name, content in [*entries, *more]:
            archive.writestr(name, content)


def test_archive_that_is_not_as_torch_writes_it(path):
    """Compressed data could unfold without end, and of two entries of one name torch picks one."""
    save_atomic({"weight": torch.zeros(4)}, path)
    rewritten(path)
    assert torch.equal(load(path)["weight"], torch.zeros(4))
    rewritten(path, zipfile.ZIP_DEFLATED)
    refusal(load, path)
    save_atomic({"weight": torch.zeros(4)}, path)
    rewritten(path, more=[("checkpoint/data/0", torch.ones(4).numpy().tobytes())] * 2)
    refusal(load, path)


@pytest.mark.parametrize("bytes_", [b"\x89PNG\r\n\x1a\n" + bytes(40), b"text\n", bytes(512)])
def test_message_about_other_files_speaks_of_no_code(path, bytes_):
    path.write_bytes(bytes_)
    assert "not a readable checkpoint" in refusal(load, path)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def test_published_file_of_old_torch_form(path, model):
    state = {key: value + 1 for key, value in model.state_dict().items()}
    legacy(state, path)
    load_weights(model, path)
    assert_same_weights(model, state)


@given(data=st.data())
def test_damaged_file_of_old_torch_form(tmp_path_factory, data):
    """It has no checksum, so numbers may differ; but nothing else than an InputError is raised."""
    path = tmp_path_factory.mktemp("legacy") / "weights.pt"
    legacy({"weight": torch.ones(5, 5), "bias": torch.zeros(5), "step": 1}, path)
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path.write_bytes(content[:end] + data.draw(st.binary(max_size=2)))
    with contextlib.suppress(InputError):
        load(path)


@pytest.mark.parametrize("change", ["cut", "appended"])
def test_length_of_a_file_of_old_torch_form(path, change):
    legacy({"weight": torch.ones(5)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change == "cut" else content + b"\0")
    refusal(load, path)


def test_missing_file_and_folder(tmp_path):
    assert "no file" in refusal(load, tmp_path / "missing.pt")
    assert "no file" in refusal(load, tmp_path)


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle", "pickle protocol 0"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_file_is_not_run(path, form, nested):
    trap = path.with_name("trap")
    content = {"model": {"weight": torch.ones(2), "x": Opens(trap)}} if nested else Opens(trap)
    if form.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    else:
        path.write_bytes(pickle.dumps(content, protocol=0 if "0" in form else 2))
    assert str(path) in refusal(load, path)
    assert not trap.exists()


def test_whole_model_is_refused(path, model):
    torch.save(model, path)
    assert "state_dict()" in refusal(load, path)


NUMBERS = [
    *(np.dtype(code).type(3) for code in "bBhHiIqQ"),
    *(np.dtype(code).type(-1.5) for code in "efd"),
    np.bool_(True), np.float64("nan"), np.float64("inf"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["torch", "torch legacy"])
def test_numbers_of_numpy_are_read_as_those_of_python(path, model, form):
    """People keep a best score so, as the published training did; also with an older NumPy."""
    content = {"state_dict": model.state_dict(), "best": NUMBERS, "one": np.float32(0.25)}
    torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    found = load(path)
    assert found["best"][:-2] == [number.item() for number in NUMBERS[:-2]]
    assert {type(number) for number in found["best"]} == {int, float, bool}
    assert math.isnan(found["best"][-2])
    assert found["one"] == 0.25
    load_weights(model, path)


def test_numbers_of_an_older_numpy_and_of_other_machines(path):
    torch.save({"a": np.float64(1.5), "b": np.dtype(">f8").type(2.5)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))
    assert load(path) == {"a": 1.5, "b": 2.5}


@pytest.mark.parametrize(
    "content",
    [
        np.str_("a"),
        np.complex64(1),
        np.zeros(2),
        np.datetime64(3, "s"),
        np.longdouble,
    ],
    ids=str,
)
def test_other_objects_of_numpy_are_refused(path, content):
    torch.save({"model": {}, "x": [content, np.float64(1)]}, path)
    assert "Python objects besides tensors" in refusal(load, path)


# --- Weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "model.module."])
@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_load_weights(path, model, prefix, under):
    state = {key: torch.randn_like(value.float()) for key, value in model.state_dict().items()}
    state["1.num_batches_tracked"] = torch.tensor(5)
    content = {prefix + key: value for key, value in state.items()}
    save_atomic(content if under is None else {under: content, "step": 3}, path)
    load_weights(model, path)
    assert_same_weights(model, state)


@pytest.mark.parametrize(
    "compiled",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("1.", "1._orig_mod."),
        lambda key: f"_orig_mod.{key.replace('1.', '1._orig_mod.')}",
    ],
)
def test_weights_of_a_compiled_model(path, model, compiled):
    state = {key: value + 1 for key, value in model.state_dict().items()}
    save_atomic({compiled(key): value for key, value in state.items()}, path)
    load_weights(model, path)
    assert_same_weights(model, state)


def test_names_of_compiled_parts_are_kept_where_they_are_needed():
    state = {"a._orig_mod.b": torch.ones(1), "a.b": torch.zeros(1)}
    assert strip_wrappers(state) == state  # none of the two is lost
    odd = {"my_orig_mod.b": torch.ones(1)}
    assert strip_wrappers(odd) == odd
    model = nn.Module()
    model._orig_mod = nn.Linear(2, 2)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    load_state(model, state, "here")
    assert_same_weights(model, state)


def test_prefix_that_belongs_to_the_model():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    assert set(state) == {"module.weight", "module.bias"}
    load_state(model, state, "here")
    assert_same_weights(model, state)


def test_every_difference_is_listed(path, model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["2.weight"] = torch.ones(2, 5)
    state["0.weight"] = torch.ones(4, 2)
    del state["0.bias"], state["1.running_var"]
    state["extra"] = torch.ones(1)
    save_atomic(state, path)
    message = refusal(load_weights, model, path)
    for part in (
        "missing 0.bias",
        "missing 1.running_var",
        "unexpected extra",
        "2.weight has shape (2, 5) instead of (2, 4)",
        "0.weight has shape (4, 2) instead of (4, 3)",
        str(path),
    ):
        assert part in message
    assert_same_weights(model, before)  # refused as a whole


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(path, model, value):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    state["2.bias"][1] = value
    save_atomic(state, path)
    message = refusal(load_weights, model, path)
    assert "2.bias" in message
    assert "2.weight" not in message
    assert_same_weights(model, before)


@pytest.mark.parametrize("content", [{"step": 3}, [torch.ones(2)], torch.ones(2), {"model": 4}])
def test_no_state_dict(path, model, content):
    save_atomic(content, path)
    assert "no state dict" in refusal(load_weights, model, path)


@pytest.mark.parametrize("key", [1, None, ("a", "b"), b"weight"])
def test_keys_that_are_no_names(path, model, key):
    save_atomic({key: torch.ones(2)}, path)
    assert "no state dict" in refusal(load_weights, model, path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "change",
    [
        Tensor.to_sparse,
        Tensor.cfloat,
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to("meta"),
    ],
    ids=["sparse", "complex", "quantised", "without data"],
)
def test_tensors_that_no_model_has(path, model, change):
    save_atomic(model.state_dict() | {"0.weight": change(torch.ones(4, 3))}, path)
    assert "0.weight" in refusal(load_weights, model, path)


def test_numbers_of_8_bits_are_loaded(path, model):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in model.state_dict().items()}
    save_atomic(state, path)
    load_weights(model, path)
    assert_same_weights(model, {key: value.float() for key, value in state.items()})


def test_empty_state_dict(path, model):
    save_atomic({}, path)
    assert "missing 0.weight" in refusal(load_weights, model, path)


def test_dtype_is_the_models(path, model):
    save_atomic({key: value.double() for key, value in model.state_dict().items()}, path)
    load_weights(model, path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
