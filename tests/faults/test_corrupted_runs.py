"""A few of the corruptions that corrupted_runs.py makes, through the real commands."""

import pytest

from corrupted_runs import judged
from corruptions import ALLOWED, KINDS
from harness import TRAINERS


@pytest.mark.slow  # test_corruptions.py corrupts the files without commands
@pytest.mark.parametrize("count", [1, len(KINDS)], ids=["one", "each kind"])
@pytest.mark.parametrize("trainer", TRAINERS, indirect=True)
def test_corrupted_runs(trainer, count, server, whole, tmp_path):
    outcomes = []
    for corruption, outcome, said in judged(trainer, tmp_path, whole(trainer), server, count):
        assert outcome in ALLOWED, f"{corruption}: {said}"
        outcomes.append(outcome)
    assert "fell back" in outcomes
