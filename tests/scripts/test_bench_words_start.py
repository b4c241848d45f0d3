"""bench_words_start.py on tiny runs: the tables, and which runs it does."""

import json

import bench_words_start
import pytest
import torch

from deq_sequence.command import main as train_main
from small_model import TINY_RUN


@pytest.fixture
def command(tmp_path, monkeypatch, demo_folder):
    """Run the command with runs in this process; its exit code and the flags of the runs."""
    trained = []

    def here(flags):
        trained.append(" ".join(flags))
        return train_main(flags)

    monkeypatch.setattr(bench_words_start, "SETTINGS", TINY_RUN)
    monkeypatch.setattr(bench_words_start, "DATA", demo_folder)
    monkeypatch.setattr(bench_words_start, "launch", here)
    monkeypatch.setattr(bench_words_start, "TOKENS", 3)

    def run(*more):
        trained.clear()
        places = ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
        return bench_words_start.main([*places, "--max_steps", "1", *more]), list(trained)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_command(command, tmp_path, capsys):
    flags = ["--networks", "zero:6", "learned:2", "--f_thres", "2", "6"]
    code, trained = command(*flags, "--seeds", "1")
    assert code == 0
    assert ["--f_start learned --f_thres 2 --eval_state value" in run for run in trained] == [0, 1]
    assert "--f_start zero --f_thres 6 --eval_state point" in trained[0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found["ms_per_token"][name] > 0 for name in ("zero:6", "learned:2"))
    for run, states in zip(found["runs"], (2, 1), strict=True):
        assert len(run["rows"]) == 4 * states  # two ways, two thresholds
        assert all(0 < row["nfe"] <= row["f_thres"] for row in run["rows"])
    assert [row.get("apart", {}).get("tokens", 0) > 0 for row in found["runs"]] == [False, True]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 6 + 2 + 3
    assert [line.split()[1] for line in lines[10:]] == ["zero", "zero", "learned"]
    assert "tokens of the test text" in bench_words_start.report(found)
    assert command(*flags, "--seeds", "1") == (0, [])  # all are there


def test_the_fewest_evaluations():
    def run(start, f_thres, values):
        rows = [
            {"way": way, "state": state, "f_thres": n, "valid": v, "test": v, "residual": 0.1}
            for way in bench_words_start.WAYS
            for state in ("point", "value")
            for n, v in values.items()
        ]
        return {
            **{"start": start, "f_thres": f_thres, "seed": 1, "minutes": 1.0},
            "rows": rows,
        }

    runs = [run("zero", 6, {2: 90, 3: 80, 6: 70}), run("learned", 2, {2: 70.3, 3: 70, 6: 71})]
    speeds = {"zero:6": 2.0, "learned:2": 1.0}
    lines = bench_words_start.evaluations({"runs": runs, "ms_per_token": speeds}).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["point", "value", "value"]
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["6", "6", "2"]
    assert "no run zero:6" in bench_words_start.evaluations({"runs": runs[1:]})


@pytest.mark.parametrize("name", ["zero", "one:2", "zero:0", "zero:x"])
def test_a_network_that_does_not_exist(command, capsys, name):
    assert command("--networks", name)[0] == 2
    assert "--networks" in capsys.readouterr().err
