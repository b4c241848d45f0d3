"""A full disk ends a run with one line, and costs nothing that was there.

Either the limit on the size of a process's files plays the full disk, one file at a time, or a
small file system is filled up.
"""

import os
import shutil
import signal
import subprocess
from itertools import product

import pytest

from attempts import Attempt, run
from harness import (
    SAVED_EVERY,
    TRAINERS,
    assert_same_run,
    records,
    saved_step,
    temporary_files,
    unreadable,
)
from lib.runs.run_folder import CHECKPOINT, LOG, METRICS, WEIGHTS
from parameters import slow_but

KILLED_AT = 11  # so the checkpoint is of step 9, and the weights are of step 10 or none
TO = "run"
# Saved after a validation only; and without the shared memory of a loading process, which counts
# as a file.
RARELY = {
    "language": "--save-interval 0",
    "classification": "SAVE_FREQ 0 WORKERS 0",
    "segmentation": "SAVE_FREQ 0",
}
KIB = 1024


@pytest.fixture(scope="session")
def begun(server, tmp_path_factory):
    """``begun(trainer)``: the parent folder of a run that was killed. Copy it."""
    parents = {}

    def get(trainer):
        if trainer not in parents:
            parent = tmp_path_factory.mktemp("begun")
            with Attempt(trainer.start(parent, TO), server=server) as attempt:
                assert attempt.wait_for_step(KILLED_AT)
                attempt.send(signal.SIGKILL)
            folder = trainer.folder(parent, TO)
            for name in temporary_files(folder):
                (folder / name).unlink()
            assert saved_step(folder) >= KILLED_AT - KILLED_AT % SAVED_EVERY
            parents[trainer] = parent
        return parents[trainer]

    return get


def tensors(folder):
    """The bytes of all checkpoints and weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def refused(trainer, parent, server, *more, **options):
    """Resume where not all can be written; the line on the error stream."""
    folder = trainer.folder(parent, TO)
    before, files, step = records(folder), tensors(folder), saved_step(folder)
    command = [*trainer.resume(parent, TO), *more]
    code, errors = run(command, server=server, patience=30, **options)
    assert code == 2, errors
    (line,) = errors.splitlines()  # no traceback, of no thread either
    assert str(folder / CHECKPOINT) in line  # the last good one
    # Nothing that was there has changed. Only the weights of the first validation can have come.
    now = tensors(folder)
    assert {name: now.get(name) for name in files} == files
    assert now.keys() - files.keys() <= {WEIGHTS}
    assert unreadable(folder) == []
    assert temporary_files(folder) == set()
    kept = [record for record in before if record["step"] <= step]
    assert records(folder)[: len(kept)] == kept
    return line


def goes_on(trainer, parent, server, whole):
    """Resume where there is room again: the run is the one that was never disturbed."""
    assert run(trainer.resume(parent, TO), server=server) == (0, "")
    assert_same_run(trainer.folder(parent, TO), whole(trainer))


# ---- one file that does not fit -----------------------------------------------------------------


def fits_not(folder, what):
    """A limit under which one file is the first that cannot be written, as a rule."""
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {
        CHECKPOINT: size[CHECKPOINT] // 2,
        WEIGHTS: 15_000,
        "records": max(n for name, n in size.items() if not name.endswith(".pt")) + 50,
        "nothing": 500,
    }[what]


# Whatever cannot be written, the line names it, and what the run goes on from: so Run has to name
# the settings, the records, the log and the events as the trainer does weights and checkpoints.
@pytest.mark.parametrize(
    ("name", "what"),
    slow_but(
        [("language", CHECKPOINT), ("language", "nothing")],
        product(TRAINERS, [CHECKPOINT, WEIGHTS, "records", "nothing"]),
    ),
)
def test_a_file_that_does_not_fit(name, what, server, begun, whole, tmp_path):
    trainer = TRAINERS[name]
    parent = shutil.copytree(begun(trainer), tmp_path / "parent")
    folder = trainer.folder(parent, TO)
    more = [] if what == CHECKPOINT else RARELY[name].split()
    limit = fits_not(folder, what)
    line = refused(trainer, parent, server, *more, max_file_size=limit)
    assert "File too large" in line
    named = {CHECKPOINT: [CHECKPOINT], WEIGHTS: [WEIGHTS], "records": [LOG, METRICS]}
    assert any(str(folder / file) in line for file in named.get(what, [""]))
    if what != "nothing":  # else all is as it was
        goes_on(trainer, parent, server, whole)


def test_the_first_checkpoint_does_not_fit(server, tmp_path):
    trainer = TRAINERS["language"]
    command = trainer.start(tmp_path, TO)
    code, errors = run(command, server=server, patience=30, max_file_size=30_000)
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert str(trainer.folder(tmp_path, TO) / CHECKPOINT) in line
    assert "last good" not in line
    assert temporary_files(trainer.folder(tmp_path, TO)) == set()


# So Run has to look after the errors of TensorBoard's thread.
def test_events_that_do_not_fit(server, tmp_path):
    """Nobody waits for ever for a thread that a failed write has ended."""
    trainer = TRAINERS["language"]
    more = "--pretrain_steps 0 --save-interval 0 --eval-interval 1000".split()
    command = [*trainer.start(tmp_path, TO), *more]
    code, errors = run(command, server=server, patience=30, max_file_size=6_000)
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert str(trainer.folder(tmp_path, TO)) in line


@pytest.mark.slow
# So a loading process has to end when the trainer's asks for it, though no signal to all ends it.
def test_an_error_of_a_loading_process_ends_the_run(server, tmp_path):
    """Here, that there is no more shared memory: nobody waits for ever for the process to end."""
    trainer = TRAINERS["classification"]
    # A batch of larger images does not fit where all that is written before it does.
    larger = ["MODEL.IMAGE_SIZE", "[48,48]", "SAVE_FREQ", "0"]
    command = [*trainer.start(tmp_path, TO), *larger]
    code, errors = run(command, server=server, patience=60, max_file_size=15_000)
    assert code != 0
    assert "to the right size" in errors


# ---- a full file system --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a mebibyte, and a function that fills it but for so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")

    def fill(left):
        filler, space = place / "filler", os.statvfs(place)
        filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - left)))
        return filler

    try:
        yield place, fill
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize(
    ("name", "left"),
    slow_but([("language", 60 * KIB)], product(TRAINERS, [60 * KIB, 4 * KIB, 0])),
)
def test_full_disk(name, left, server, begun, whole, small_disk):
    trainer = TRAINERS[name]
    place, fill = small_disk
    parent = shutil.copytree(begun(trainer), place / "parent")
    filler = fill(left)
    assert "No space left" in refused(trainer, parent, server)
    filler.unlink()
    goes_on(trainer, parent, server, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kib", range(4, 300, 24))
def test_disk_that_fills_up_on_the_way(trainer, kib, server, begun, whole, small_disk):
    """Wherever the space ends: amid a checkpoint, in front of the weights, in a record."""
    place, fill = small_disk
    parent = shutil.copytree(begun(trainer), place / "parent")
    filler = fill(kib * KIB)
    folder = trainer.folder(parent, TO)
    code, errors = run(trainer.resume(parent, TO), server=server, patience=30)
    if code:  # else all went in
        assert (code, len(errors.splitlines())) == (2, 1), errors
        assert "No space left" in errors
        assert str(folder / CHECKPOINT) in errors
        assert unreadable(folder) == []
        assert temporary_files(folder) == set()
        assert saved_step(folder) >= KILLED_AT - KILLED_AT % SAVED_EVERY
    filler.unlink()
    goes_on(trainer, parent, server, whole)
