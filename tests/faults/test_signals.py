"""SIGTERM and SIGINT let a run finish its step and save it; it goes on as if nothing had been."""

import random
import re
import signal
import time

import pytest

from attempts import Attempt, run
from harness import BORDER, STEPS, TRAINERS, assert_same_run, records, saved_step, temporary_files
from parameters import slow_but

TO = "run"
SIGNALS = [signal.SIGTERM, signal.SIGINT]
PHASES = {"stacked": (1, BORDER - 2), "equilibrium": (BORDER + 1, STEPS - 12)}


def stopped(attempt, number, folder):
    """Signal the process group, as a terminal and a cluster do; the step at which it stopped."""
    attempt.send(number)
    code = attempt.wait()
    said = "\n".join(attempt.lines) + attempt.errors()
    assert code == 128 + number, said
    assert "Traceback" not in said
    (step,) = {int(s) for s in re.findall(rf"stopped by {number.name} at step (\d+)", said)}
    assert saved_step(folder) == step == records(folder)[-1]["step"]
    assert temporary_files(folder) == set()
    return step


def stop_and_resume(trainer, number, at, delay, parent, whole, server=None):
    """Signal a run a while after a step, and resume it; the step at which it stopped."""
    folder = trainer.folder(parent, TO)
    with Attempt(trainer.start(parent, TO), server=server) as attempt:
        assert attempt.wait_for_step(at)
        time.sleep(delay)
        step = stopped(attempt, number, folder)
    assert at <= step < STEPS
    assert run(trainer.resume(parent, TO), server=server) == (0, "")
    assert_same_run(folder, whole(trainer))
    return step


# The classifier (slow) loads in a process of its own, which gets the signal too, and outlives it.
@pytest.mark.parametrize("trainer", slow_but(["language"], TRAINERS), indirect=True)
def test_stopped_by_a_signal(trainer, server, whole, tmp_path):
    """One of the four combinations; the others are slow."""
    i = list(TRAINERS).index(trainer.name)
    number, phase = SIGNALS[i % 2], list(PHASES)[(i + 1) // 2 % 2]
    at = random.Random(i).randrange(*PHASES[phase])
    stop_and_resume(trainer, number, at, 0.005, tmp_path, whole, server)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_at_any_moment(trainer, number, phase, seed, server, whole, tmp_path):
    rng = random.Random(f"{number} {phase} {seed}")
    at, delay = rng.randrange(*PHASES[phase]), rng.uniform(0, 0.05)
    # The command proper in the last case.
    stop_and_resume(trainer, number, at, delay, tmp_path, whole, server if seed < 2 else None)


@pytest.mark.slow  # tests/lib/test_trainer.py breaks a validation off by default
@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_during_a_validation(trainer, number, server, whole, tmp_path):
    """It is broken off, or done; if broken off, it comes again."""
    at = next(s for s in trainer.validated if s > BORDER)
    assert stop_and_resume(trainer, number, at, 0.002, tmp_path, whole, server) == at


@pytest.mark.slow
def test_stopped_again_and_again(trainer, server, whole, tmp_path):
    """A job that a cluster stops every few steps."""
    rng, folder = random.Random(0), trainer.folder(tmp_path, TO)
    for at in range(7, STEPS - 10, 9):
        with Attempt(trainer.resume(tmp_path, TO), server=server) as attempt:
            assert attempt.wait_for_step(at)
            stopped(attempt, rng.choice(SIGNALS), folder)
    assert run(trainer.resume(tmp_path, TO)) == (0, "")
    assert_same_run(folder, whole(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_start_up_costs_nothing(trainer, number, server, whole, tmp_path):
    """There is no step to finish: the run ends at once, and what was saved stays."""
    folder = trainer.folder(tmp_path, TO)
    with Attempt(trainer.start(tmp_path, TO), server=server) as attempt:
        assert attempt.wait_for_step(20)
        step = stopped(attempt, signal.SIGTERM, folder)
    with Attempt(trainer.resume(tmp_path, TO), server=server) as attempt:
        time.sleep(0.02)
        attempt.send(number)
        assert attempt.wait() in (-number, 128 + number)
        assert not attempt.steps or saved_step(folder) > step
    assert saved_step(folder) >= step
    assert run(trainer.resume(tmp_path, TO), server=server) == (0, "")
    assert_same_run(folder, whole(trainer))
