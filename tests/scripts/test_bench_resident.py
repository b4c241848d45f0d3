"""scripts/benchmarks/bench_resident.py: its figures, and the command."""

import json
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace

import bench_resident
import pytest
from helpers.resident import Watch, growth, heap_bytes, resident_bytes, slope, watched

from lib.runs.memory import release_free_memory
from lib.runs.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts/benchmarks/bench_resident.py"
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


def test_steps_that_are_compared_and_looked_at():
    windows = bench_resident._windows(ARGS)
    assert windows["stacked"] == ((200, 300), (401, 500))
    assert windows["equilibrium"] == ((600, 700), (1901, 2000))
    assert bench_resident._marked(ARGS) == {200, 600, 1000, 1500, 2000}


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


def test_every_step_is_watched(monkeypatch):
    monkeypatch.setattr(Trainer, "update", lambda trainer, batch: batch == "last")
    trainer, watch = SimpleNamespace(step=1), Watch(frozenset([2]))
    update = Trainer.update
    with watched(watch, steps=2):
        assert not Trainer.update(trainer, "first")
        trainer.step = 2
        assert Trainer.update(trainer, "last")
    assert Trainer.update is update
    assert len(watch.resident) == 2
    (mark,) = watch.marks
    assert (mark.step, mark.resident) == (2, watch.resident[1])
    assert mark.objects > 1000


@pytest.mark.parametrize(
    "trainers", ["digits", pytest.param("words,scenes", marks=pytest.mark.slow)]
)
def test_command(trainers, tmp_path, request):
    out = tmp_path / "out.json"
    if "words" in trainers:
        shutil.copytree(request.getfixturevalue("demo_folder"), tmp_path / "demo")
    flags = ["--tiny", "--trainers", trainers, "--steps", "40", "--border", "20", "--every", "10"]
    flags += ["--data", str(tmp_path / "demo"), "--json", str(out)]
    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ms/step" not in done.stdout  # the runs' own lines are left out
    records = json.loads(out.read_text())
    assert [record["trainer"] for record in records] == trainers.split(",")
    for record in records:
        assert f"## {record['trainer']}" in done.stdout
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
