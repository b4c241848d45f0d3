"""A run goes on in another number of processes, or in other parts, as if it had always had them."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import Case, Recorder, make_trainer
from groups import run_group, work
from lib.runs.checkpoint import load, save_atomic
from lib.runs.interrupts import Stopped
from lib.runs.processes import Processes

BEFORE, AFTER = 4, 2  # steps of the first part, which ends just beyond the border, and the second
# Losses, the position in the data, the memory and the optimiser's moments all matter.
CASES = {
    "words": Case("words", steps=BEFORE + AFTER, more=("--varlen", "--scheduler", "inv_sqrt")),
    "digits": Case("digits", steps=BEFORE + AFTER),
}
TOLERANCE = 1e-8

# ---- what each process does ---------------------------------------------------------------------


def run_on(
    processes: Processes, case: Case, data: str, checkpoint: Path | None, stop: int | None = None
) -> dict:
    """Train from the start or a checkpoint, to the end or as if the time were up at step ``stop``.

    Returns the losses, what the checkpoint had to say, and the state of the run.
    """
    trainer, run, lines = make_trainer(case, processes, data), Recorder(), []
    if checkpoint is not None:
        lines = trainer.load_state_dict(load(checkpoint), checkpoint)
    due = trainer.due

    def due_or_over():
        trainer.stopping.time_is_up |= processes.leads and trainer.step + 1 == stop
        return due()

    trainer.due = due_or_over
    with contextlib.suppress(Stopped):
        trainer.train(run)
    return {"losses": run.losses(), "lines": lines, "state": trainer.state_dict()}


def found_by(processes: Processes, name: str, data: str, file: str, chunk: str, part: str) -> dict:
    """The first part, whose state is saved in ``file``, or the second, which begins with that."""
    case = replace(CASES[name], chunk=int(chunk))
    if part == "first":
        found = run_on(processes, case, data, None, stop=BEFORE)
        processes.lead(lambda: save_atomic(found["state"], Path(file)))
    else:
        found = run_on(processes, case, data, Path(file))
    return found


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(demo_folder):
    """The uninterrupted run of one process."""
    data = str(demo_folder)
    return {name: run_on(Processes(), case, data, None) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def part(demo_folder, tmp_path_factory, server):
    """Run a part in a number of processes: ``part(world_size, name, file, chunk, which)``."""
    folder = tmp_path_factory.mktemp("parts")

    def run(world_size, name, file, chunk, which):
        argv = (name, str(demo_folder), str(file), str(chunk), which)
        if world_size == 1:
            return found_by(Processes(), *argv)
        place = folder / f"{len(list(folder.iterdir()))}"
        return run_group(__file__, world_size, place, *argv, server=server, timeout=200)[0]

    return run


def assert_continues(whole, first, second):
    """Both parts are the whole, in losses, weights and memory."""
    losses = first["losses"] + second["losses"]
    assert losses == pytest.approx(whole["losses"], rel=TOLERANCE)
    a, b = second["state"], whole["state"]
    for key in ("model", "state_dict", "optimizer", "mems"):
        if key in b:
            torch.testing.assert_close(a[key], b[key], rtol=TOLERANCE, atol=TOLERANCE)
    for key in ("epoch", "row", "position", "step"):
        assert a.get(key) == b.get(key)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_then_one(whole, part, tmp_path, name):
    first = part(2, name, tmp_path / "c.pt", 1, "first")
    second = part(1, name, tmp_path / "c.pt", 1, "second")
    assert_continues(whole[name], first, second)
    (line,) = second["lines"]
    assert line.startswith("1 process(es) continue what 2 began: dropout masks")


def test_one_process_then_two_in_parts(whole, part, tmp_path):
    """--batch_chunk may change too."""
    first = part(1, "words", tmp_path / "c.pt", 4, "first")
    second = part(2, "words", tmp_path / "c.pt", 2, "second")
    assert_continues(whole["words"], first, second)
    assert len(second["lines"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (4, 2), (1, 4)])
def test_other_numbers_of_processes(whole, part, tmp_path, name, before, after):
    first = part(before, name, tmp_path / "c.pt", 1, "first")
    second = part(after, name, tmp_path / "c.pt", 1, "second")
    assert_continues(whole[name], first, second)
    assert len(second["lines"]) == 1


def test_parts_alone_may_change(whole, part, tmp_path):
    first = part(1, "words", tmp_path / "c.pt", 2, "first")
    second = part(1, "words", tmp_path / "c.pt", 1, "second")
    assert_continues(whole["words"], first, second)
    assert second["lines"] == []


if __name__ == "__main__":
    work(found_by, sys.argv[1:])
