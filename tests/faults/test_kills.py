"""A run that is killed by SIGKILL at any moment goes on as if nothing had been."""

import random
import shutil

import pytest
import torch

from harness import STEPS, TRAINERS, assert_same_run
from kills import kill_and_resume, main
from lib.runs.checkpoint import load, save_atomic
from lib.runs.run_folder import CHECKPOINT, METRICS, WEIGHTS
from parameters import slow_but


# The image trainers save and resume through the same code of lib.runs; test_resume_vision.py
# and the slow tests here and of test_signals.py resume them bit for bit.
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


def test_another_run_is_told_apart(whole, tmp_path):
    """The comparison notices one other number in the records, the weights or the checkpoint."""
    folder = whole(TRAINERS["language"])

    def changed(name, change):
        other = shutil.copytree(folder, tmp_path / name)
        change(other / name)
        with pytest.raises(AssertionError):
            assert_same_run(other, folder)

    def records(path):
        *rest, last = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rest) + last.replace(f'"step": {STEPS}', '"step": 1'))

    def tensor(path):
        state = load(path)
        tensors = state if path.name == WEIGHTS else state["optimizer"]["state"][0]
        value = next(t for t in tensors.values() if t.is_floating_point() and t.dim())
        value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(torch.inf))
        save_atomic(state, path)

    changed(METRICS, records)
    changed(WEIGHTS, tensor)
    changed(CHECKPOINT, tensor)
