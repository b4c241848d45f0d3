"""scripts/export_weights.py: weights of both trainers, in both formats, and bad input."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deq_sequence.trained import KIND, of_run
from export_weights import export_weights, main
from lib.runs.checkpoint import load_weights, read_state, save_atomic
from lib.runs.model_file import read_model_file
from model_card import MARK
from small_model import build
from small_vision import MDEQClsNet, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPT, WORDS = ROOT / "scripts/export_weights.py", ROOT / "docs/models/words.safetensors"

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


@pytest.fixture
def run(tmp_path):
    """The folder of a run with the weights of the model in the repository."""
    found = read_model_file(WORDS, KIND, of_run)
    (folder := tmp_path / "run").mkdir()
    settings = found.settings | {"data": str(tmp_path), "work_dir": str(tmp_path)}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "vocabulary.json").write_text(json.dumps(found.names))
    save_atomic(found.state, folder / "model.pt")
    return folder


def test_a_run_is_exported_with_its_card(tmp_path, run, capsys):
    """Tied weights once; figures that are not finite left out; the audit in the card."""
    records = [
        {"kind": "valid", "step": 1, "phase": "equilibrium", "loss": 9.0, "nfe": 6.0},
        {"kind": "final_test", "step": 2, "loss": 4.0, "nfe": 6.0, "rel_residual": 0.5, "x": None},
        {"kind": "final_valid", "step": 2, "loss": None, "nfe": 6.0},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    audit = {
        "verdict": "equilibrium",
        "reason": "it is",
        "measure": "log-likelihood",
        "cuts": [{"name": "2", "evaluations": 2.0, "measure": -4.5, "residual": 0.1}],
        "radius": {"samples": 3, "mean": 0.5, "largest": 0.75},
        "correctness": {"said": "no relation"},
        "effort": {"said": "no relation"},
    }
    (run / "audit.json").write_text(json.dumps(audit))
    target = tmp_path / "new/words.safetensors"
    assert main([str(run), str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{target.with_suffix('.md')}: its card"
    found, before = (read_model_file(path, KIND, of_run) for path in (target, WORDS))
    assert found.state.keys() == before.state.keys()
    assert all(torch.equal(found.state[name], before.state[name]) for name in found.state)
    assert (found.names, found.settings["lr"]) == (before.names, before.settings["lr"])
    assert found.figures["final_test"] == {
        "step": 2, "loss": 4.0, "nfe": 6.0, "rel_residual": 0.5,
    }  # fmt: skip
    assert target.stat().st_size < 1.05 * WORDS.stat().st_size
    again = tmp_path / "again.safetensors"
    assert main([str(run), str(again)]) == 0
    assert again.read_bytes() == target.read_bytes()
    card = target.with_suffix(".md").read_text()
    for part in (MARK, "| perplexity (test) | 54.598 |", "verdict of the audit: equilibrium"):
        assert part in card
    assert "(valid) | 6.0" in card
    assert "nan" not in card
    assert "mean 0.500, largest 0.750" in card
    for text in (card, json.dumps(found.settings)):
        assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("change", "target", "part"),
    [
        (lambda run: None, "x.pt", "a run is exported to a .safetensors file, not to x.pt"),
        (lambda run: None, "folder.safetensors", "folder.safetensors is a folder"),
        (lambda run: None, "page.safetensors", "page.md exists and is no card"),
        (lambda run: (run / "settings.json").unlink(), "x.safetensors", "run holds no run"),
        (lambda run: (run / "model.pt").unlink(), "x.safetensors", "no file run/model.pt"),
        (lambda run: (run / "settings.json").write_text("{"), "x.safetensors", "not readable JSON"),
        (lambda run: (run / "audit.json").write_text("{}"), "x.safetensors", "is no audit"),
        (
            lambda run: save_atomic({"a": torch.tensor(torch.nan)}, run / "model.pt"),
            "x.safetensors",
            "are not finite",
        ),
        (
            lambda run: save_atomic({"a": torch.ones(2)}, run / "model.pt"),
            "x.safetensors",
            "do not fit this model",
        ),
    ],
)
def test_a_run_that_cannot_be_exported(tmp_path, monkeypatch, capsys, run, change, target, part):
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("my own notes\n")
    Path("folder.safetensors").mkdir()
    change(run)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["run", target]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert part in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("page.md").read_text() == "my own notes\n"


def test_command(tmp_path, monkeypatch):
    source, target = tmp_path / "model.pt", tmp_path / "model.safetensors"
    save_atomic({"weight": torch.ones(2)}, source)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(target)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert torch.equal(read_state(target)["weight"], torch.ones(2))
