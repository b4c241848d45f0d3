"""Several processes train as one does: two of them on a few steps, or the whole table."""

import math
import subprocess
import sys

import pytest

import same_losses
from cases import Case
from lib.runs.processes import Processes
from same_losses import ADAPTIVE, comparison, equal, in_processes, reference, run_cases

STEPS = 4  # two stacked, two at equilibrium
# Both phases, the Jacobian loss, parts of a batch, shares that differ; and at the end of an epoch
# of digits a batch of three images, or of a single one that both processes get.
QUICK = [
    Case("words", "Jacobian loss", jacobian=True, steps=STEPS),
    Case("words", "2 parts of 5", batch=10, chunk=2, steps=STEPS, more=ADAPTIVE),
    Case("words", "one storage", steps=STEPS, more=(*ADAPTIVE, "--tie_proj_mode", "storage")),
    Case("digits", "Jacobian loss", jacobian=True, steps=STEPS),
    Case("digits", "batch of 6", batch=6, steps=STEPS),
    Case("digits", "2 parts, same groups", chunk=2, steps=STEPS),
    Case("scenes", "batch of 3", batch=3, jacobian=True, steps=STEPS),
]


@pytest.fixture(scope="module")
def both(demo_folder, tmp_path_factory, server):
    """What two processes found, and what one process with the same batches did."""
    folder = tmp_path_factory.mktemp("group")
    two = in_processes(folder, 2, str(demo_folder), QUICK, server)
    return two, run_cases(Processes(), str(demo_folder), [reference(case, 2) for case in QUICK])


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.model}, {case.name}")
def test_two_processes_compute_what_one_does(both, case):
    two, one = both
    found, expected = two[case], one[reference(case, 2)]
    assert len(expected.losses) == STEPS
    assert expected.residual < 1e-10  # or nothing below means anything
    assert expected.jac_loss > 1e-6
    assert math.isfinite(expected.jac_loss) == case.jacobian
    row = comparison(found, expected, STEPS // 2)
    assert equal(row), row
    assert row["weights"] < 1e-6
    assert len(set(expected.losses)) == STEPS


def test_a_difference_is_seen(both):
    """Parts that batch norm does not see alike: the measure of what would be wrong."""
    two, one = both
    case = next(case for case in QUICK if case.name == "batch of 6")
    other = next(case for case in QUICK if case.name.endswith("same groups"))
    row = comparison(two[other], one[case], STEPS // 2)
    assert not equal(row)


@pytest.mark.slow
def test_the_whole_table(demo_folder):
    command = [sys.executable, same_losses.__file__, "--data", str(demo_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.count(" | ") > 5][1:]
    assert {(model, n) for model, _, n, *_ in rows} == {
        (model, str(n)) for model in same_losses.MODELS for n in same_losses.WORLD_SIZES
    }
