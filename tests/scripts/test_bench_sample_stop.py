"""bench_sample_stop.py on a few images and segments: what is counted, and the table."""

import json
from functools import partial

import bench_sample_stop
import pytest
import torch
from bench_sample_stop import BATCH, SAMPLE, TIGHT, Recorded, main

from lib.solvers import anderson
from lib.solvers.maps import transformed


def linear(rates):
    """f(z) = a z + 1 with a rate for each sample, which can be restricted to samples."""

    def f(z):
        return rates[:, None] * z + 1

    f.select = lambda rows: linear(rates[rows])
    return f


def test_evaluations_are_counted_on_the_samples_that_are_left():
    rates = torch.tensor([0.0, 0.5, 0.9])
    seen = []

    def change(f):
        return lambda z: (seen.append(len(z)), f(z))[1]

    found = {}
    for stop in ("batch", "sample"):
        seen.clear()
        found[stop] = solver = Recorded(anderson, 1e-4, stop=stop, eps=1e-4)
        solution = solver(transformed(linear(rates), change), torch.zeros(3, 4), threshold=50)
        assert (solver.evaluations, solver.samples) == (sum(seen), 3)
        assert solver.residual == solution["residual"].max().item()
        assert solver.above == int((solution["residual"] >= 1e-4).sum())
    assert seen[0] == 3 > seen[-1]
    assert found["sample"].evaluations == int(solution["sample_nfe"].sum())
    assert found["sample"].evaluations < found["batch"].evaluations


def test_the_command(tmp_path, capsys, monkeypatch):
    small = partial(bench_sample_stop.images, name="digits")
    monkeypatch.setattr(bench_sample_stop, "TASKS", {"digits": small})
    out, threads = tmp_path / "found.json", torch.get_num_threads()
    flags = ["--samples", "20", "--rounds", "1", "--device", "cpu", "--json", str(out)]
    try:
        assert main(flags) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + len(rows)  # machine, head, a line for each way
    assert [row["way"] for row in rows] == [BATCH, SAMPLE, TIGHT] * 2
    for batch, sample, tight in (rows[:3], rows[3:]):
        assert batch["above"] > 0 == sample["above"] == tight["above"]
        assert sample["residual"] < sample["goal"] == sample["eps"] <= batch["residual"]
        assert tight["residual"] < tight["goal"] > tight["eps"]
        assert sample["evaluations"] < tight["evaluations"]
        assert batch["figure"] == pytest.approx(sample["figure"], abs=5)
        assert all(len(row["seconds"]) == 1 for row in (batch, sample, tight))


def test_before_the_tolerance_both_ways_are_one(demo_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_sample_stop, "DATA", demo_folder)
    out, threads = tmp_path / "found.json", torch.get_num_threads()
    flags = ["--tasks", "words", "--samples", "1", "--rounds", "1", "--device", "cpu"]
    try:
        assert main([*flags, "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    batch, sample = rows[:2]  # at the threshold of training no solve has converged
    assert rows[2]["way"] == BATCH
    assert batch["evaluations"] == sample["evaluations"] == batch["f_thres"] == 6
    assert batch["figure"] == pytest.approx(sample["figure"], rel=1e-6)
    assert batch["above"] == sample["above"] == 1
    assert "| words (perplexity) | 6 " in capsys.readouterr().out
