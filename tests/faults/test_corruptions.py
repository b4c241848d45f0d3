"""Corrupted checkpoints are refused, passed over, or loaded unharmed; their code never runs."""

import pytest
import torch

from corruptions import ALLOWED, KINDS, Corruption, Judge, corruptions


@pytest.mark.parametrize("corruption", list(corruptions(2 * len(KINDS))), ids=lambda c: c.kind)
def test_corruption(tmp_path, corruption):
    outcome, words = Judge(tmp_path).outcome(corruption)
    assert outcome in ALLOWED, words


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_of_both(tmp_path, kind):
    outcome, words = Judge(tmp_path).outcome(Corruption(kind, seed=1, both=True))
    assert outcome in ALLOWED, words


def test_nothing_is_corrupted_without_a_corruption(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "none", lambda path, rng, trap: None)
    assert Judge(tmp_path).outcome(Corruption("none", 0, both=True)) == ("loaded unharmed", "")


def test_judge_notices_what_gets_by(tmp_path, monkeypatch):
    """The instrument itself: a loader without any check fails it in every way."""
    judge = Judge(tmp_path)

    def outcomes(kind):
        found = (Corruption(kind, seed, both=False) for seed in range(5))
        return {judge.outcome(corruption)[0] for corruption in found}

    monkeypatch.setattr(
        "lib.runs.retention.load", lambda path: torch.load(path, weights_only=False)
    )
    assert outcomes("bits of a tensor") == {"silent wrong"}
    assert outcomes("torch file with code") == {"code run"}
    assert outcomes("text") == {"traceback"}


def test_same_seed_same_corruption(tmp_path):
    judge, found = Judge(tmp_path), []
    for _ in range(2):
        judge._write()
        Corruption("several bits", 3, both=True).apply(judge.path, judge.trap)
        found.append([file.read_bytes() for file in sorted(tmp_path.iterdir())])
    assert found[0] == found[1]
    assert list(corruptions(40, seed=1)) == list(corruptions(40, seed=1))
    assert list(corruptions(40, seed=1)) != list(corruptions(40, seed=2))
