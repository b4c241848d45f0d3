"""bench_generation.py on a short text: the table, its figures, and the same probabilities."""

import json
from functools import partial

import torch
from bench_generation import AGAIN, KEPT, WARM, WORDS, exactly, main, text, with_memory

import deq_sequence
from lib.solvers import anderson


def test_the_command(tmp_path, capsys):
    out = tmp_path / "found.json"
    flags = ["--tokens", "8", "--rounds", "2", "--f_thres", "2", "40", "--device", "cpu"]
    assert main([*flags, "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + 6  # machine, head, a line for each way
    found = json.loads(out.read_text())
    assert [(w["way"], w["f_thres"]) for w in found["ways"]] == [
        (way, f) for f in (2, 40) for way in (KEPT, WARM, AGAIN)
    ]
    few, many = ({w["way"]: w for w in found["ways"] if w["f_thres"] == f} for f in (2, 40))
    for way in (KEPT, WARM, AGAIN):
        assert few[way]["evaluations"] == 2
        assert 2 < many[way]["evaluations"] < 40  # they stop at their tolerance
        assert many[way]["mean_difference"] < 0.1 * few[way]["mean_difference"]
        assert many[way]["mean_difference"] <= many[way]["largest_difference"]
        assert len(many[way]["seconds"]) == 2
        assert many[way]["tokens_per_s"] > 0


def test_both_starts_lead_to_one_fixed_point():
    trained = deq_sequence.load(WORDS)
    model, ids = trained.model, text(trained, 6)
    model.reset_length(None, 6)
    exact = exactly(model, ids)
    model.f_solver = partial(anderson, eps=1e-7)
    for warm_start in (False, True):
        found = with_memory(model, ids, 200, warm_start)
        assert torch.allclose(found, exact, rtol=0, atol=1e-4)
        assert torch.allclose(found.exp().sum(dim=1), torch.ones(6), atol=1e-4)
