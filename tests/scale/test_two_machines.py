"""Two machines train together; what happens to one must not lose the run."""

from pathlib import Path

import pytest

from machines import two_machines
from two_machines import BORDER, Trial, fall_silent, lose, stop, terminate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    try:
        with two_machines() as pair:
            yield pair
    except PermissionError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture(scope="module")
def trial(pair, tmp_path_factory) -> Trial:
    """With an uninterrupted run, "whole"."""
    trial = Trial(pair, Path(tmp_path_factory.mktemp("machines")))
    trial.finish("whole")
    return trial


def test_two_power_cuts(trial):
    """Of either machine, in either phase."""
    lose(trial, "run", 20, lost=1)
    lose(trial, "run", BORDER + 20, lost=0)
    trial.finish("run")
    assert trial.differences("run", "whole") == []


def test_a_cut_cable_is_noticed(trial):
    try:
        seconds = fall_silent(trial, "cut", 20, lambda: trial.pair.cable("down"), 0.05)
    finally:
        trial.pair.cable("up")
    assert max(seconds) < 60
    trial.finish("cut")
    assert trial.differences("cut", "whole") == []


def test_a_signal_to_one_process_stops_both(trial):
    stop(trial, "stopped", 20, terminate(trial.pair, 1))
    trial.finish("stopped")
    assert trial.differences("stopped", "whole") == []


def test_a_killed_worker_is_started_again(trial):
    """By torchrun, in the same job."""
    launches = trial.start("again", RESTARTS="1")
    trial.reach("again", 20, launches)
    trial.pair.machines[1].signal(9, workers=True)
    for launch in launches:
        assert launch.ended(180) == 0, launch.err
    assert trial.differences("again", "whole") == []
