"""scripts/benchmarks/bench_resident.py: its figures, and the command."""

import json
import shutil
from array import array
from pathlib import Path
from types import SimpleNamespace

import bench_resident
import pytest
import torch
from helpers.resident import Watch, growth, heap_bytes, resident_bytes, slope

from lib.runs.evaluation_loop import release_free_memory

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)
ARGS = SimpleNamespace(steps=2000, border=500)


def test_resident_memory_of_what_is_touched():
    release_free_memory()  # else it may be memory that is resident already
    before, given = resident_bytes(), heap_bytes()
    held = bytearray(b"x" * 50_000_000)
    assert 45e6 < resident_bytes() - before < 120e6
    if given is not None:
        assert heap_bytes() - given > 45e6
    del held


def test_growth_and_slope():
    resident = [100] * 10 + [102] * 10
    assert growth(resident, (1, 10), (11, 20)) == pytest.approx(0.02)
    assert growth(resident, (1, 5), (6, 10)) == 0
    assert growth([5, 1, 9, 1], (1, 2), (3, 4), of=min) == 0
    assert slope([7, 7, *range(100, 160, 3)], first=3) == pytest.approx(3)


def test_a_leak_is_seen_and_reported():
    """A byte in a hundred thousand per step is 1.25 % from step 650 to step 1950."""
    watch = Watch(frozenset(), array("q", [10**8 + 1000 * step for step in range(1, 2001)]))
    record = bench_resident._record("words", watch, ARGS)
    assert record["stretches"]["equilibrium"]["growth"] == pytest.approx(0.0129, abs=1e-4)
    assert record["slope"] == pytest.approx(1000)
    assert (record["maximum"], record["maximum_at"]) == (10**8 + 2_000_000, 2000)
    assert "no " in bench_resident.summary([record]).splitlines()[-1]
    watch.resident = array("q", [10**8] * 2000)
    record = bench_resident._record("words", watch, ARGS)
    assert "yes" in bench_resident.summary([record]).splitlines()[-1]
    assert (
        "+0.00 % (lowest +0.00 %) from steps 600 to 700 to steps 1901 to 2000"
        in bench_resident.report(record)
    )


@pytest.mark.parametrize(
    "trainers", ["digits", pytest.param("words,scenes", marks=pytest.mark.slow)]
)
def test_command(trainers, tmp_path, request, monkeypatch, capsys):
    out = tmp_path / "out.json"
    if "words" in trainers:
        shutil.copytree(request.getfixturevalue("demo_folder"), tmp_path / "demo")
    # A new process takes seconds to begin; test_bench_solvers.py measures in one.
    monkeypatch.setattr(bench_resident, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is of the whole process
    flags = ["--tiny", "--trainers", trainers, "--steps", "40", "--border", "20", "--every", "10"]
    assert bench_resident.main([*flags, "--data", str(tmp_path / "demo"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ms/step" not in printed  # the runs' own lines are left out
    records = json.loads(out.read_text())
    assert [record["trainer"] for record in records] == trainers.split(",")
    for record in records:
        assert f"## {record['trainer']}" in printed
        assert len(record["resident"]) == 40
        assert min(record["resident"]) > 50e6
        assert [mark["step"] for mark in record["marks"]] == [4, 12, 20, 30, 40]
        assert all(mark["tensors"] > 10 for mark in record["marks"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainers", "images"], "unknown 'images'"),
        (["--steps", "20"], "--steps is 20"),
        (["--steps", "100", "--border", "90"], "--border 90"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    assert bench_resident.main(["--tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
