"""The example of one's own layer, as it stands, and its benchmark."""

import importlib.util
import json
from pathlib import Path

import bench_own_layer
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_layer.py"


def test_example_beats_logistic_regression(capsys):
    spec = importlib.util.spec_from_file_location("own_layer", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    accuracy = example.main(["--steps", "300"])
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert accuracy > float(lines["logistic regression"])
    assert lines["test accuracy"] == f"{accuracy:.3f}"
    assert float(lines["relative residual"]) < 1e-3
    assert int(lines["evaluations of f"]) < 30
    assert float(lines["largest radius"]) < 0.91


def test_benchmark(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_own_layer, "STEPS", 2)
    out = tmp_path / "figures.json"
    only = ["half, jacobian 0.3", "spectral 0.9"]
    assert bench_own_layer.main(["--seeds", "1", "--json", str(out), "--only", *only]) == 0
    figures = json.loads(out.read_text())
    assert list(figures["runs"]) == only
    assert len(figures["table"]["rows"]) == 1 + len(only)
    assert "logistic regression" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench_own_layer.LAYERS)
def test_a_layer_is_a_map_of_the_state(name):
    _, make, _ = bench_own_layer.LAYERS[name]
    layer = make()
    u = layer.inject(torch.rand(3, 64))
    assert layer(torch.zeros_like(u), u).shape == u.shape


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--only", "nothing"]])
def test_bad_arguments(arguments, capsys):
    assert bench_own_layer.main(arguments) == 2
    assert arguments[0] in capsys.readouterr().err
