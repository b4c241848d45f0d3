"""A run that is killed by SIGKILL at any moment goes on as if nothing had been."""

import random

import pytest

from attempts import run
from harness import TRAINERS, assert_same_run
from kills import kill_and_resume, main
from parameters import slow_but


# The image trainers save and resume through the same code of lib.runs; test_signals.py resumes one
# of them bit for bit.
@pytest.mark.parametrize("trainer", slow_but(["language"], TRAINERS), indirect=True)
def test_kills(trainer, server, whole, tmp_path):
    """The undisturbed run was forked and the last attempt is not, so both ways are the same."""
    rng = random.Random(0)
    found = kill_and_resume(trainer, 2, rng, tmp_path, server, whole(trainer))
    assert found.problems == []
    assert found.kills.total() == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_many_kills(trainer, seed, capsys):
    assert main(["--trainer", trainer.name, "--kills", "30", "--seed", str(seed)]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    name, _, kills, writing, *_, equal = row.split(" | ")
    assert (name.strip(), equal) == (trainer.name, "yes")
    assert int(kills) >= 25  # a kill can come after the end
    assert int(writing) >= 10


def test_another_run_is_told_apart(server, whole, tmp_path):
    """The comparison would notice: a run of one other setting has other records and weights."""
    trainer = TRAINERS["language"]
    command = [*trainer.start(tmp_path, "other"), "--lr", "0.0100001"]
    assert run(command, server=server) == (0, "")
    with pytest.raises(AssertionError):
        assert_same_run(trainer.folder(tmp_path, "other"), whole(trainer))
