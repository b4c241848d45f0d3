"""The example of prefix sums, and its comparison with stacked networks, at small sizes."""

import json
from pathlib import Path

import pytest
import torch

import prefix_sums
import prefix_sums_compared as compared
from prefix_sums import PLAIN, WINDOWS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model():
    """Trained on at most 12 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sums, "TRAINED", 12)
        return prefix_sums.train(seed=0, steps=200)


def test_it_answers_strings_longer_than_those_of_its_training(model):
    for way in (PLAIN, WINDOWS):
        found = prefix_sums.measure(model, way, 128, 8)
        assert found["exact"] == 1
        assert found["residual"] < 1e-5  # the tolerance of the solver


def test_a_sweep_finds_the_fixed_point_of_plain_iteration(model):
    x, _ = prefix_sums.strings(4, 100)
    with torch.no_grad():
        plain = model(x)
        for window, overlap in ((64, 16), (7, 3), (100, 16), (300, 0)):
            assert torch.allclose(model.sweep(x, window, overlap), plain, atol=1e-2, rtol=1e-3)


def test_the_work_of_a_sweep_per_bit_does_not_grow(model):
    def evaluations(way, length):
        return prefix_sums.measure(model, way, length, 2)["evaluations"]

    assert evaluations(WINDOWS, 512) < 1.2 * evaluations(WINDOWS, 128)
    assert evaluations(PLAIN, 512) > 512


def test_prefix_sums_of_a_string():
    x, y = prefix_sums.strings(3, 5)
    bits = (x[:, 0] > 0).tolist()
    assert set(x.flatten().tolist()) == {-1, 1}
    assert y.tolist() == [[sum(row[: i + 1]) % 2 for i in range(5)] for row in bits]


@pytest.mark.parametrize("tied", [True, False])
def test_a_stack_carries_no_bit_further_than_its_depth(tied):
    stack = compared.Stack(5, tied)
    x, _ = prefix_sums.strings(1, 12)
    other = x.clone()
    other[..., 0] *= -1
    with torch.no_grad():
        changed = (stack(x) != stack(other)).any(1)[0].tolist()
    assert changed == [True] * 6 + [False] * 6


def test_the_table_and_the_weights(tmp_path, capsys):
    file = tmp_path / "weights.pt"
    prefix_sums.main(["--steps", "1", "--longest", "32", "--save", str(file)])
    trained, head, row, total = capsys.readouterr().out.splitlines()
    assert trained.startswith("prefix sums: trained on at most 32 bits")
    assert "residual" in head
    assert row.split()[:3] == ["plain", "iteration", "32"]
    assert total.endswith("s in all")
    loaded, same = prefix_sums.load(file), prefix_sums.train(steps=1)
    assert all(map(torch.equal, loaded.parameters(), same.parameters()))


@pytest.fixture
def figures(monkeypatch, tmp_path, capsys):
    """What the comparison writes and prints, at the smallest sizes."""
    monkeypatch.setattr(compared, "BITS", {2: 2, 8: 2})
    out = tmp_path / "figures.json"
    compared.main(["--steps", "1", "--stacked", "1", "--grads", "1", "--out", str(out)])
    return out, capsys.readouterr().out


def test_the_comparison(figures, capsys):
    file, printed = figures
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == 1 + len(compared.STACKS) + len(compared.OTHERS)
    assert {run["name"] for run in runs} == {
        "equilibrium", "equilibrium, jfb", "equilibrium, ift",
        *(f"{depth} layers, {kind}" for depth in (12, 40) for kind in ("tied", "untied")),
    }  # fmt: skip
    assert {run["steps"] for run in runs if "layers" in run["name"]} == {1, 2}
    picture = file.with_suffix(".png")
    compared.main(["--from", str(file), "--figure", str(picture)])
    assert capsys.readouterr().out == printed
    assert picture.read_bytes().startswith(PNG)


def test_the_picture_is_that_of_the_data(tmp_path):
    picture = tmp_path / "prefix_sums.png"
    compared.main(["--from", str(DOCS / "data/prefix_sums.json"), "--figure", str(picture)])
    assert picture.read_bytes() == (DOCS / "figures/prefix_sums.png").read_bytes()
    assert picture.stat().st_size < 80_000


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        (prefix_sums, ["--steps", "0"], "steps is 0"),
        (prefix_sums, ["--grad", "jbf"], "unknown grad 'jbf'"),
        (prefix_sums, ["--save", "no/where.pt"], "--save is 'no/where.pt'"),
        (prefix_sums, ["--longest", "31"], "--longest is 31"),
        (prefix_sums, ["--step", "3"], "--step"),
        (compared, ["--seeds", "0"], "--seeds is 0"),
        (compared, ["--stacked", "-1"], "--stacked is -1"),
        (compared, ["--out", "no/where.json"], "no/where.json"),
        (compared, ["--figure", "no/where.png"], "no/where.png"),
        (compared, ["--from", "nowhere.json"], "nowhere.json"),
        (compared, ["--from", __file__], "a file that --out wrote"),
    ],
)
def test_bad_flags_are_one_line(command, arguments, named, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
