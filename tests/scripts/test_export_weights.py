"""scripts/export_weights.py: weights of both trainers, in both formats, and bad input."""

import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from export_weights import export_weights, main
from lib.runs.checkpoint import load_weights, read_state, save_atomic
from small_model import build
from small_vision import MDEQClsNet, tiny_config

SCRIPT = Path(__file__).parents[2] / "scripts/export_weights.py"

# Each with what its trainer's checkpoint calls the weights.
MODELS = {
    "words": (build, "model"),
    "images": (lambda seed=0: MDEQClsNet(tiny_config()), "state_dict"),
}


@pytest.fixture(params=MODELS)
def trained(request):
    """A model, another one of the same settings, and the name of the weights in a checkpoint."""
    make, under = MODELS[request.param]
    return make(), make(seed=1), under


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("source", ["model.pt", "checkpoint.pt", "model.safetensors"])
def test_weights_survive(tmp_path, capsys, trained, source, suffix):
    model, other, under = trained
    state = model.state_dict()
    source, target = tmp_path / source, tmp_path / "new" / f"exported{suffix}"
    if source.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, source)
    else:
        save_atomic({under: state, "step": 3} if "check" in source.name else state, source)
    assert main([str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: {len(state)} tensors of {source}\n"
    assert_same(model, read_state(target))
    load_weights(other, target)
    assert_same(model, other.state_dict())
    if suffix == ".safetensors":  # with the names of tied weights, for any reader of the format
        assert_same(model, safetensors.torch.load_file(target))


def test_tied_weights_stay_tied(tmp_path, monkeypatch):
    """In a .pt file, also if .cpu() copies, as it does on a GPU."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    weight = torch.arange(6.0)
    state = {"a": weight.detach(), "b": weight.detach(), "half": weight[:3], "own": weight.clone()}
    export_weights(state, tmp_path / "new.pt")
    found = torch.load(tmp_path / "new.pt", weights_only=True)
    storage = {name: value.untyped_storage().data_ptr() for name, value in found.items()}
    assert storage["a"] == storage["b"]
    assert len({storage["a"], storage["half"], storage["own"]}) == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["missing.pt", "x.pt"], "no file missing.pt"),
        (["text.pt", "x.pt"], "text.pt is not a readable checkpoint"),
        (["text.safetensors", "x.pt"], "text.safetensors is not a readable checkpoint"),
        (["numbers.pt", "x.pt"], "numbers.pt holds no state dict"),
        (["good.pt", "x.bin"], "x.bin"),
        (["good.pt", "text.pt/x.pt"], "text.pt"),
        (["good.pt", "folder.pt"], "folder.pt"),
        (["good.pt", "good.pt"], "good.pt is the file that is read"),
        (["good.pt", "./link.pt"], "link.pt is the file that is read"),
        (["good.pt", "hard.pt"], "hard.pt is the file that is read"),
        (["good.pt"], "target"),
        (["good.pt", "x.pt", "y.pt"], "y.pt"),
        (["good.pt", "x.pt", "--half"], "--half"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(tmp_path)
    for name in ("text.pt", "text.safetensors"):
        Path(name).write_text("not weights\n")
    save_atomic([1, 2], "numbers.pt")
    save_atomic({"weight": torch.ones(2)}, "good.pt")
    Path("folder.pt").mkdir()
    Path("link.pt").symlink_to("good.pt")
    Path("hard.pt").hardlink_to("good.pt")
    content = Path("good.pt").read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("export_weights.py: ")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("good.pt").read_bytes() == content


def test_command(tmp_path, monkeypatch):
    source, target = tmp_path / "model.pt", tmp_path / "model.safetensors"
    save_atomic({"weight": torch.ones(2)}, source)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(target)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert torch.equal(read_state(target)["weight"], torch.ones(2))
