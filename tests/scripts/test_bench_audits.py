"""The benchmark of audits: what it calls, what it keeps, and its tables."""

import json
import random
from types import SimpleNamespace

import bench_audits
import pytest
import torch

from lib import DEQ, audit


def toy(rate):
    """The audit of z -> rate z + x; beyond a rate of 1 nothing settles."""
    deq = DEQ("fixed_point_iteration")
    x = torch.linspace(-1, 1, 40)[:, None] + 0.01

    def forward(x):
        return deq(lambda z: rate * z + x, torch.zeros_like(x)).z

    def correct(z, target):
        return ((z > 0) == target)[:, 0]

    return audit(deq, [(x, x > 0)], correct, forward=forward, measure="sign", scales=[1.0])


@pytest.fixture
def toys(monkeypatch):
    names = {"good": lambda: toy(0.5), "bad": lambda: toy(1.5)}
    monkeypatch.setattr(bench_audits, "AUDITS", names)


@pytest.mark.usefixtures("toys")
def test_figures_and_tables(tmp_path, capsys):
    path = tmp_path / "audits.json"
    assert bench_audits.main(["--json", str(path), "--only", "bad"]) == 0
    first = json.loads(path.read_text())["audits"]
    assert bench_audits.main(["--json", str(path)]) == 0  # what the file lacks
    found = json.loads(path.read_text())
    assert found["audits"] == {"bad": first["bad"], "good": found["audits"]["good"]}
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| good", "| bad"))]
    assert rows[-4:-2] == bench_audits.report(found).splitlines()[2:]
    assert [row.split("**")[1] for row in rows[-4:-2]] == ["equilibrium", "no fixed point"]
    assert "0.50, 0.50" in rows[-4]
    assert " - " in rows[-3]
    assert "40 of 40 samples are right" in rows[-2]


def test_a_run_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_audits, "ROOT", tmp_path)
    assert bench_audits.main(["--only", "words"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("call scripts/quickstart.sh first")


@pytest.fixture
def untrained(monkeypatch):
    """The examples as they stand, with trainings of two steps and small tests."""
    load = bench_audits.example

    def example(name):
        module = load(name)
        train = module.train
        names = {n: getattr(module, n) for n in dir(module) if not n.startswith("__")}
        return SimpleNamespace(**names | {"train": lambda *a: train(*a, steps=2)})

    monkeypatch.setattr(bench_audits, "example", example)
    for name, value in {"BITS": (3, 4), "STRINGS": 3, "CELLS": (3,), "MAZES": 4}.items():
        monkeypatch.setattr(bench_audits, name, value)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("name", "samples"), [("prefix sums, jfb", 6), ("mazes", 4)])
def test_the_examples(name, samples):
    state = random.getstate()
    found = bench_audits.AUDITS[name]()
    assert random.getstate() == state
    assert (found.samples, found.measure, found.verdict) == (samples, "exact", "undecided")
    assert found.effort["said"] == f"cannot be told from {samples} samples"
