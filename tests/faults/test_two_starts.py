"""Two starts of one run at once: one owner, and no line of it is lost."""

import signal

import pytest

from attempts import Attempt
from harness import TRAINERS, records
from lib.runs.run_folder import LOG, METRICS
from parameters import slow_but

AT_ONCE = 2


def outcomes(commands, server):
    """The exit code and the error stream of each of some commands that are started at once."""
    attempts = [Attempt(command, server=server) for command in commands]
    try:
        return [(attempt.wait(), attempt.errors()) for attempt in attempts]
    finally:
        for attempt in attempts:
            attempt.__exit__()


def assert_undisturbed(folder, whole):
    """It has the records of a run that was alone, and a line of the log for each step."""
    assert records(folder) == records(whole)
    assert len((folder / METRICS).read_bytes().splitlines()) == len(records(whole))
    logs = [(place / LOG).read_text().splitlines() for place in (folder, whole)]
    assert [len(log) for log in logs] == [len(logs[1])] * 2


@pytest.mark.parametrize("round_", slow_but([0], range(20)))
def test_with_a_name(round_, server, whole, tmp_path):
    trainer = TRAINERS["language"]
    found = outcomes([trainer.start(tmp_path, "run")] * AT_ONCE, server)
    refused = [errors for code, errors in found if code == 2]
    assert sorted(code for code, _ in found) == [0] + [2] * (AT_ONCE - 1), found
    folder = trainer.folder(tmp_path, "run")
    for errors in refused:
        (line,) = errors.splitlines()
        assert f"{folder} is in use by process " in line or "already holds a run" in line
    assert_undisturbed(folder, whole(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(20))
def test_without_a_name(round_, server, whole, tmp_path):
    trainer = TRAINERS["language"]
    *command, flag, _ = trainer.start(tmp_path, "run")
    assert flag == "--name"
    assert outcomes([command] * AT_ONCE, server) == [(0, "")] * AT_ONCE
    folders = list(trainer.folder(tmp_path, "run").parent.iterdir())
    assert len(folders) == AT_ONCE
    for folder in folders:
        assert_undisturbed(folder, whole(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8])
def test_a_restart_of_a_run_that_goes_on(trainer, step, server, whole, tmp_path):
    """Before and after its first checkpoint."""
    with Attempt(trainer.start(tmp_path, "run"), server=server) as first:
        assert first.wait_for_step(step)
        first.send(signal.SIGSTOP)  # so that it is there as long as it takes
        ((code, errors),) = outcomes([trainer.resume(tmp_path, "run")], server)
        first.send(signal.SIGCONT)
        assert (code, len(errors.splitlines())) == (2, 1), errors
        assert f" is in use by process {first.pid} on " in errors
        assert first.wait() == 0
    assert_undisturbed(trainer.folder(tmp_path, "run"), whole(trainer))
