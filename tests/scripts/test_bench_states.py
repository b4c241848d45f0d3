"""bench_states.py on tiny runs: the table, and which runs it does."""

import json

import bench_states
import pytest
import torch

from deq_sequence.command import main as train_main

TINY = """
    --d_model 8 --n_head 1 --d_head 8 --d_inner 8 --init_std 0.1 --mem_len 0 --tgt_len 2
    --batch_size 4 --f_thres 3 --f_solver fixed_point_iteration --grad jfb --max_step 3
    --eval_batch_size 2 --max_eval_steps 1
""".split()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command with runs in this process; its exit code and the names of the runs."""
    trained = []

    def here(flags):
        trained.append(flags[flags.index("--name") + 1])
        return train_main([*TINY, *flags])

    monkeypatch.setattr(bench_states, "launch", here)

    def run(*more):
        trained.clear()
        found = ["--out", str(tmp_path / "states"), "--json", str(tmp_path / "found.json"), *more]
        return bench_states.main(found), list(trained)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_command(command, tmp_path, capsys):
    flags = ["--groups", "Z2", "--seeds", "1", "2", "--stacks", "2"]
    assert command(*flags) == (0, ["equilibrium-1", "equilibrium-2", "2-1"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["network"] for row in found["runs"]] == ["equilibrium", "equilibrium", 2]
    for row in found["runs"]:
        assert row["steps"] == 3
        assert [test["length"] for test in row["tests"]] == [2, 4, 8, 16]
        assert all((test["nfe"] > 0) == (row["network"] != 2) for test in row["tests"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Z2")]
    assert len(lines) == 3
    assert "2 layers" in lines[2]
    assert command(*flags) == (0, [])  # all are there
    assert command(*flags, "3") == (0, ["3-1"])


def test_a_run_that_fails(command, capsys):
    assert command("--groups", "Q8", "--seeds", "1")[0] == 2
    lines = capsys.readouterr().err.splitlines()
    assert "unknown group 'Q8'" in lines[0]
    assert "the run equilibrium-1 of Q8 ended with exit code 2" in lines[-1]
