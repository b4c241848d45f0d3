"""The audit of a language model, through scripts/audit.py and its parts."""

import json
import math

import pytest
import torch

from audit import main
from deq_sequence.command import build_model
from deq_sequence.evaluation import evaluate
from deq_sequence.own_settings import read_settings
from deq_sequence.state.evaluation import evaluation_threshold
from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from small_model import trained_on_states


@pytest.mark.parametrize("mem_len", [8, 0])
def test_a_trained_run(train, run_folder, capsys, mem_len):
    train("--mem_len", mem_len)
    capsys.readouterr()
    assert main([str(run_folder), "--samples", "10"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("verdict: ")
    assert text.endswith(f"\n{run_folder / 'audit.json'}\n")
    found = json.loads((run_folder / "audit.json").read_text())
    assert found["samples"] == 12  # three segments of four streams
    assert (found["measure"], found["threshold"]) == ("log-likelihood", 6)
    assert [cut["name"] for cut in found["cuts"]][1:4] == ["2", "4", "own threshold"]
    (run_folder / "model.pt").unlink()
    assert main([str(run_folder)]) == 2
    assert "model.pt" in capsys.readouterr().err


def test_the_measure_is_that_of_an_evaluation(train, run_folder, small_corpus, tmp_path, capsys):
    """All segments of the text after those that fill the memory, by the run's own threshold."""
    train()
    args = read_settings(run_folder / "settings.json")
    model = build_model(args, small_corpus, torch.device("cpu"))
    load_weights(model, run_folder / "model.pt")
    options = {"batch_size": 4, "tgt_len": 16, "mem_len": 8, "f_thres": 6}
    both, first = (evaluate(model, small_corpus.test, max_steps=n, **options) for n in (3, 1))
    out = tmp_path / "elsewhere.json"
    assert main([str(run_folder), "--samples", "8", "--out", str(out)]) == 0
    own = next(c for c in json.loads(out.read_text())["cuts"] if c["name"] == "own threshold")
    expected = (both.loss * both.tokens - first.loss * first.tokens) / (both.tokens - first.tokens)
    assert own["measure"] == pytest.approx(-expected, rel=1e-5)
    assert math.isclose(own["evaluations"], 6)
    assert not (run_folder / "audit.json").exists()


def test_more_samples_than_the_text_has(train, run_folder, capsys):
    train()
    assert main([str(run_folder), "--samples", "100000"]) == 2
    assert "segments of 16 words with a memory, but 100000 samples" in capsys.readouterr().err


def test_settings_of_an_older_run(train, run_folder):
    """A flag that the run does not know has its default."""
    train()
    path = run_folder / "settings.json"
    saved = json.loads(path.read_text())
    del saved["tie_proj_mode"]
    path.write_text(json.dumps(saved))
    args = read_settings(path)
    assert (args.tie_proj_mode, args.d_model) == ("apart", 16)
    path.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_settings(path)


def test_a_run_of_state_tracking(tmp_path, capsys):
    """Its strings are those of the run's seed; a longer one is a harder sample."""
    folder = trained_on_states(tmp_path)
    assert main([str(folder), "--samples", "3"]) == 0
    found = json.loads((folder / "audit.json").read_text())
    assert (found["samples"], found["measure"]) == (4, "whole strings right")
    args = read_settings(folder / "settings.json")
    thresholds = [evaluation_threshold(args, length) for length in (3, 6)]
    assert thresholds == [6, 8]
    assert found["threshold"] == thresholds[1]
    assert "whole strings right" in capsys.readouterr().out
