"""bench_steps.py: rows of tiny models; torchdeq is an optional package, and not installed here."""

import json
import sys

import bench_steps
import pytest
from helpers.settings import SIZES


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny models, measured in this process."""
    models = {name: (setting, SIZES["tiny"]) for name, (setting, _) in bench_steps.MODELS.items()}
    monkeypatch.setattr(bench_steps, "MODELS", models)
    monkeypatch.setattr(bench_steps, "in_new_process", lambda function, *args: function(*args))


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
def test_bf16_beside_float32(tmp_path, capsys):
    path = tmp_path / "figures.json"
    argv = ["--rows", "words-implicit-bf16", "--repeats", "2", "--json", str(path)]
    assert bench_steps.main(argv) == 0
    found = json.loads(path.read_text())["rows"]
    for row in found.values():
        for form in row.values():
            assert [seconds > 0 for seconds in form["seconds"]] == [True, True]
            assert min(form["tensors"], *form["nfe"]) > 1
        # Three steps from the same weights, with the same words: bfloat16 has 8 bits.
        assert row["bf16"]["losses"] == pytest.approx(row["float32"]["losses"], rel=0.02)
        assert row["bf16"]["losses"] != row["float32"]["losses"]
    assert capsys.readouterr().out.count("float32 / bf16") == 1


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
@pytest.mark.parametrize(
    "row", ["plain-small", pytest.param("plain-cifar", marks=pytest.mark.slow), "gmres-cifar"]
)
def test_beside_the_plain_form(row, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert bench_steps.main(["--rows", row, "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    plain, ours = (figures["rows"][row][form] for form in bench_steps.ROWS[row].forms)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert len(ours["nfe"]) == len(plain["nfe"]) == 2  # of forward and adjoint
    assert ours["tensors"] <= plain["tensors"]
    assert bench_steps.report(figures) in capsys.readouterr().out


@pytest.mark.parametrize("row", ["small-phantom", "tiny-anderson"])
def test_without_torchdeq(row, monkeypatch, capsys):
    for name in ("torchdeq", "torchdeq.solver.anderson"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench_steps.main(["--rows", row]) == 2
    assert "pip install --no-deps torchdeq==0.1.0" in capsys.readouterr().err


def test_an_unknown_row(capsys):
    assert bench_steps.main(["--rows", "small-fantom"]) == 2
    assert "small-phantom" in capsys.readouterr().err
