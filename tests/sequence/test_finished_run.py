"""scripts/evaluations.py of language models and of state tracking, on real runs."""

import json

import pytest
import torch

import gradient_errors
from deq_sequence.finished_run import training_of
from evaluations import main
from gradient_errors import measure
from small_model import trained_on_states

SETTLED = "--pre_lnorm --init_std 0.05 --inject own"  # so that f settles without training
CPU = torch.device("cpu")


def test_a_trained_run(train, run_folder, capsys):
    train("--grad", "jfb", "--save-interval", 2, *SETTLED.split())
    capsys.readouterr()
    assert main([str(run_folder), "--batches", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("solver anderson, gradient jfb, 2 batches of the training data")
    assert text.endswith(f"\n{run_folder / 'evaluations.json'}\n")
    found = json.loads((run_folder / "evaluations.json").read_text())
    assert [row["threshold"] for row in found["rows"]] == [1, 2, 3, 4, 6, 8, 12]
    assert (found["own"], found["batches"], found["graphs"]) == (6, 2, 1)
    assert found["residual"] < 1e-6
    residuals = [row["residual"] for row in found["rows"]]
    assert residuals == sorted(residuals, reverse=True)
    assert text.count("\n6*") == 0 < text.count(" 6*")
    # The same again, and other weights of the run.
    for name, same in (("model.pt", True), ("checkpoint.1.pt", False)):
        out = run_folder / f"{name}.json"
        argv = [str(run_folder), "--batches", "2", "--weights", name, "--out", str(out)]
        assert main(argv) == 0
        assert (json.loads(out.read_text()) == found) == same
    (run_folder / "model.pt").unlink()
    assert main([str(run_folder)]) == 2
    assert "model.pt" in capsys.readouterr().err


def test_all_solves_of_a_batch_are_of_one_equation(train, run_folder):
    """With dropout, memory, parts of a batch and a learned start: with many evaluations, the run's
    own gradient is the exact one."""
    flags = f"""
        {SETTLED} --dropout 0.3 --dropatt 0.2 --batch_chunk 2 --f_start learned --mem_len 12
        --f_solver anderson:eps=1e-8 --b_solver gmres:eps=1e-8 --f_thres 32 --b_thres 60
    """
    train(*flags.split(), "--max_step", 4)
    trainer, own, batches = training_of(run_folder, run_folder / "model.pt", 2, CPU)
    assert own == 32
    assert trainer.model.start is not None
    found = measure(trainer, own, batches)
    assert (found.solver, found.gradient, found.batches) == ("anderson", "ift", 2)
    errors = {row.threshold: row.error for row in found.rows}
    assert errors[48] < 1e-4 < 0.01 < errors[2]
    assert found.rows[-1].difference == pytest.approx(0, abs=1e-5)


def test_segments_lie_apart_and_have_a_memory(train, run_folder, capsys):
    train("--mem_len", 12)
    trainer, _, batches = training_of(run_folder, run_folder / "model.pt", 3, CPU)
    rows, text = [], trainer.iterator.data
    for data, target in batches:
        assert data.shape == target.shape == (8, 4)
        (memory,) = trainer.mems
        assert [len(part) for part in memory] == [12, 12]
        (row,) = (i for i in range(len(text) - 8) if torch.equal(text[i : i + 8], data))
        assert torch.equal(text[row + 1 : row + 9], target)
        rows.append(row)
    apart = (trainer.iterator.rows - 1) // 8 // 3 * 8
    assert rows == [16, 16 + apart, 16 + 2 * apart]
    assert main([str(run_folder), "--batches", "400"]) == 2
    assert "segments of 8 words, too few for 400 batches with a memory" in capsys.readouterr().err


def test_state_tracking(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_errors, "LONGEST", 20)  # f of so short a run hardly settles
    folder = trained_on_states(tmp_path)
    assert main([str(folder), "--batches", "3"]) == 0
    found = json.loads((folder / "evaluations.json").read_text())
    assert (found["own"], found["batches"]) == (3, 3)  # 2 + 3 * 0.34
    assert "3*" in capsys.readouterr().out
