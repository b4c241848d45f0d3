"""Two machines train together; what happens to one must not lose the run.

Where there can be no network namespaces, the tests of ``two`` are skipped, and those of ``one``
have both launch files on one machine. What the launch files add to two processes, they show in
one case by default.
"""

import signal
import socket
import time
from pathlib import Path

import pytest

from attempts import Attempt
from lib.runs.processes import TIMEOUT
from machines import ROOT, Pair, one_machine, two_machines
from two_machines import BORDER, PATIENCE, Trial, fall_silent, little_space, lose, stop, terminate

RANK = Path(__file__).with_name("one_rank.py")


@pytest.fixture(scope="module")
def two() -> Pair:
    try:
        with two_machines() as pair:
            yield pair
    except PermissionError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture(scope="module")
def one() -> Pair:
    with one_machine() as pair:
        yield pair


@pytest.fixture(scope="module")
def trial(request, tmp_path_factory) -> Trial:
    """With an uninterrupted run, "whole"; the parameter says what is trained, and where."""
    what, where = request.param.split(" on ")
    folder = Path(tmp_path_factory.mktemp("machines"))
    trial = Trial(request.getfixturevalue(where), folder, pictures=what == "pictures")
    trial.finish("whole")
    return trial


def on(*kinds):
    return pytest.mark.parametrize("trial", kinds, indirect=True)


# ---- by default ----------------------------------------------------------------------------------


@pytest.mark.slow  # waits longer than the one below
def test_a_power_cut_is_noticed(two, tmp_path):
    lose(Trial(two, tmp_path), "run", 2, lost=1)


def test_a_process_that_falls_silent_is_noticed(server, tmp_path):
    """Its connections stay open, but nothing comes any more; after 6 s the other one gives up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    training = Trial(None, tmp_path).words("run")
    script = ROOT / "DEQ-Sequence" / training[1]
    commands = [
        [str(RANK), str(rank), str(port), "0.1", str(script), *training[2:]] for rank in range(2)
    ]
    with Attempt(commands[0], server=server) as first, Attempt(commands[1], server=server) as other:
        assert first.wait_for_step(2)
        began = time.monotonic()
        other.send(signal.SIGSTOP)
        assert first.wait() == 1
        assert time.monotonic() - began >= 3
        (line,) = first.errors().splitlines()
    assert line.startswith("train_transformer.py: lost the other processes (")


# ---- lost ----------------------------------------------------------------------------------------


@pytest.mark.slow
@on("words on two", "pictures on two", "words on one")
def test_two_power_cuts(trial):
    """Of either machine, in either phase."""
    lose(trial, "run", 20, lost=1)
    lose(trial, "run", BORDER + 20, lost=0)
    trial.finish("run")
    assert trial.differences("run", "whole") == []


@pytest.mark.slow
@on("words on two", "pictures on two")
def test_a_cut_cable_is_noticed(trial):
    try:
        seconds = fall_silent(trial, "cut", 20, lambda: trial.pair.cable("down"), 0.05)
    finally:
        trial.pair.cable("up")
    assert max(seconds) < 60
    trial.finish("cut")
    assert trial.differences("cut", "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize("machine", [0, 1])
@on("words on two")
def test_a_killed_worker_is_started_again(trial, machine):
    """By torchrun, in the same job; also the one that writes the files."""
    name = f"again{machine}"
    launches = trial.start(name, AUTO_RESTART="0", RESTARTS="1")
    trial.reach(name, 20, launches)
    trial.pair.machines[machine].signal(signal.SIGKILL, workers=True)
    for launch in launches:
        assert launch.ended(PATIENCE) == 0, launch.err
    assert trial.differences(name, "whole") == []


# ---- stopped -------------------------------------------------------------------------------------


@pytest.mark.slow
@on("words on two", "pictures on two")
def test_signals_stop_both(trial):
    """To one training process; then, in the other phase, to one torchrun."""
    first = stop(trial, "stopped", 20, terminate(trial.pair, 1))
    assert first < BORDER
    torchrun = lambda launches: launches[1].process.send_signal(signal.SIGTERM)  # noqa: E731
    assert stop(trial, "stopped", BORDER + 20, torchrun) > first
    trial.finish("stopped")
    assert trial.differences("stopped", "whole") == []


# ---- full, or refused ----------------------------------------------------------------------------


@pytest.fixture
def said_by_all(two, tmp_path):
    """The line that both training processes end with, and the run's folder."""

    def run(*more, size=10**9, **variables):
        trial = Trial(two, tmp_path)
        with little_space(size):
            launches = trial.start("run", *more, **variables)
        for launch in launches:
            assert launch.ended(PATIENCE) == 1, launch.err
        (line,) = {trial.said(launch) for launch in launches}
        return line, trial.run_folder("run")

    return run


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(said_by_all):
    line, folder = said_by_all(size=30_000)
    assert f"{folder}/checkpoint.pt could not be written at step 7 (File too large)" in line


@pytest.mark.slow
def test_records_that_cannot_be_written(said_by_all):
    line, folder = said_by_all("--save-interval", "900", "--eval-interval", "900", size=25_000)
    assert f"{folder} could not be written at step " in line  # its TensorBoard events


@pytest.mark.slow
def test_a_folder_that_cannot_be_made(said_by_all, tmp_path):
    (tmp_path / "file-wt103").write_text("")
    line, _ = said_by_all("--work_dir", str(tmp_path / "file"))
    assert "file-wt103" in line


@pytest.mark.slow
def test_a_bad_timeout(said_by_all):
    line, _ = said_by_all(**{TIMEOUT: "soon"})
    assert f"{TIMEOUT} is 'soon', but must be a number of minutes" in line
