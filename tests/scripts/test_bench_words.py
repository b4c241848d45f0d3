"""bench_words.py on tiny runs: equal time, the table, and which runs it does."""

import json

import bench_words
import pytest
import torch

from deq_sequence.command import main as train_main
from small_model import TINY_RUN


@pytest.fixture
def command(tmp_path, monkeypatch, demo_folder):
    """Run the command with runs in this process; its exit code and the flags of the runs."""
    trained = []

    def here(flags):
        trained.append(flags)
        return train_main(flags)

    monkeypatch.setattr(bench_words, "SETTINGS", TINY_RUN)
    monkeypatch.setattr(bench_words, "DATA", demo_folder)
    monkeypatch.setattr(bench_words, "launch", here)

    def run(*more):
        trained.clear()
        places = ["--out", str(tmp_path / "words"), "--json", str(tmp_path / "found.json")]
        return bench_words.main([*places, "--rounds", "1", *more]), list(trained)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_command(command, tmp_path, capsys):
    flags = ["--seeds", "1", "2", "--stacks", "3"]
    code, trained = command(*flags)
    assert code == 0
    assert [run[run.index("--seed") + 1] for run in trained] == ["1", "1", "2", "2"]
    found = json.loads((tmp_path / "found.json").read_text())
    cost = found["seconds_per_step"]
    whole = 2 * cost["2"] + 2 * cost["equilibrium"]
    assert found["steps"] == {"3": max(1, round(whole / cost["3"]))}
    assert [row["network"] for row in found["runs"]] == ["equilibrium", 3, "equilibrium", 3]
    for row in found["runs"]:
        solved = row["network"] == "equilibrium"
        assert row["steps"] == (4 if solved else found["steps"]["3"])
        assert (row["nfe"] > 0) == solved
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4
    values = [row["test"] for row in found["runs"] if row["network"] == 3]
    assert f"({min(values):.1f} to {max(values):.1f})" in lines[3]
    assert command(*flags) == (0, [])  # all are there
    assert command(*flags, "1")[0] == 0  # one more stack
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["steps"].keys() == {"1", "3"}
    assert again["steps"]["3"] == found["steps"]["3"]  # as its runs have them


def test_without_stacks(command, capsys):
    code, trained = command("--seeds", "1", "--stacks")
    assert (code, len(trained)) == (0, 1)
    assert "| equilibrium | 4 " in capsys.readouterr().out


def test_no_round(command, capsys):
    assert command("--rounds", "0")[0] == 2
    assert "--rounds" in capsys.readouterr().err


def test_a_run_that_fails(command, monkeypatch, capsys):
    monkeypatch.setattr(bench_words, "launch", lambda flags: 2)
    assert command("--seeds", "1", "--stacks", "3")[0] == 2
    assert "the run equilibrium-1 ended with exit code 2" in capsys.readouterr().err
