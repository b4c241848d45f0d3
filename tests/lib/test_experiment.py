"""A run's folder: what is written there, and what a restart keeps of it."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch

from events import scalars, texts
from lib.errors import InputError
from lib.runs.run_folder import (
    CHECKPOINT,
    LOG,
    METRICS,
    SETTINGS,
    Run,
    check_unused,
    own,
    peak_memory_mib,
    read_metrics,
)

SAVED = (SETTINGS, '{"lr": 0.1}')


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def started(folder, steps):
    """A run that recorded a training loss at each of ``steps``, closed."""
    run = Run(folder, SAVED)
    for step in steps:
        run.record("train", step, loss=1 / step)
    run.log("first")
    run.close()


# ---- places ----------------------------------------------------------------------------------


def test_check_unused(folder):
    check_unused(folder, "go elsewhere")
    own(folder).close()
    check_unused(folder, "go elsewhere")  # the lock of a run that wrote nothing
    started(folder, [1])
    with pytest.raises(InputError) as caught:
        check_unused(folder, "go elsewhere")
    assert str(folder) in str(caught.value)
    assert "go elsewhere" in str(caught.value)
    check_unused(folder, "go elsewhere", anew=True)  # it was killed before its first checkpoint
    (folder / CHECKPOINT).write_bytes(b"")
    with pytest.raises(InputError):
        check_unused(folder, "go elsewhere", anew=True)


# ---- what is written -------------------------------------------------------------------------


def test_files_of_a_run(folder, capsys):
    own = "own.yaml", "lr: 0.1\nname: ä\n"
    run = Run(folder, own, events=folder / "events", beside=[("words.json", '["a"]')])
    run.log("a line")
    run.record("train", 3, loss=2.5, lr=0.5)
    run.record("valid", 4, loss=2.25, phase="stacked")
    # All of it is on the disk while the run goes on: a kill loses nothing.
    assert (folder / LOG).read_text() == "a line\n"
    assert read_metrics(folder) == [
        {"kind": "train", "step": 3, "loss": 2.5, "lr": 0.5},
        {"kind": "valid", "step": 4, "loss": 2.25, "phase": "stacked"},
    ]
    assert (folder / "own.yaml").read_text() == "lr: 0.1\nname: ä\n"
    assert (folder / "words.json").read_text() == '["a"]'
    run.close()
    assert "a line" in capsys.readouterr().out
    assert scalars(folder) == []
    assert texts(folder / "events") == [("settings/text_summary", 0, "```\nlr: 0.1\nname: ä\n```")]
    assert scalars(folder / "events") == [
        ("train/loss", 3, 2.5),
        ("train/lr", 3, 0.5),
        ("valid/loss", 4, 2.25),
    ]


@pytest.mark.parametrize("loss", [1.0, math.nan])  # TensorBoard is not given the latter
@pytest.mark.parametrize("lines", [0, 1])
def test_a_full_disk_is_an_error_of_sync(folder, loss, lines):
    """Of no other call, and of each of its own; nothing waits for ever or prints a traceback."""
    run = Run(folder, SAVED, quiet=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for step in range(1000):
            run.record("train", step, loss=loss)
            run.log("a line" * 100 * lines)
        for _ in range(2):
            with pytest.raises(OSError, match="File too large") as caught:
                run.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.close()
    assert run.failure is caught.value
    first = LOG if lines else METRICS if math.isnan(loss) else ""
    assert Path(caught.value.filename) == folder / first
    steps = [record["step"] for record in read_metrics(folder)]
    assert steps == list(range(len(steps)))
    assert 10 < len(steps) < 1000


def test_no_bar_without_a_terminal(capsys):
    run = Run(None, SAVED)
    with run.progress(total=3, initial=1) as bar:
        bar.update()
    run.close()
    assert capsys.readouterr().err == ""


def test_a_quiet_run_prints_nothing(folder, capsys):
    run = Run(folder, SAVED, quiet=True)
    run.log("a line")
    run.close()
    assert capsys.readouterr().out == ""
    assert (folder / LOG).read_text() == "a line\n"


# ---- restart ---------------------------------------------------------------------------------


def test_a_restart_drops_what_comes_again(folder):
    started(folder, range(1, 11))
    run = Run(folder, (SETTINGS, '{"lr": 0.2}'), resume_step=7)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6, 7]
    run.record("train", 8, loss=8.0)
    run.log("second")
    run.close()
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert records[6] == {"kind": "train", "step": 7, "loss": 1 / 7}
    assert records[7]["loss"] == 8.0
    assert (folder / LOG).read_text() == "first\nsecond\n"  # the log tells all that happened
    assert json.loads((folder / SETTINGS).read_text()) == {"lr": 0.2}


def test_a_restart_from_step_0_keeps_the_log(folder):
    started(folder, [1, 2])
    Run(folder, SAVED, resume_step=0).close()
    assert read_metrics(folder) == []
    assert (folder / LOG).read_text() == "first\n"


def test_a_new_run_begins_with_empty_files(folder):
    started(folder, [1, 2, 3])
    started(folder, [9])
    assert [record["step"] for record in read_metrics(folder)] == [9]
    assert (folder / LOG).read_text() == "first\n"


@pytest.mark.parametrize(
    "end", ['{"kind": "train", "st', '{"kind": "train", "step": 3', "{", "\x00"]
)
def test_a_last_line_that_was_cut_off(folder, end):
    started(folder, [1, 2])
    with open(folder / METRICS, "a") as file:
        file.write(end)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2]
    run = Run(folder, SAVED, resume_step=2)
    run.record("train", 3, loss=3.0)
    run.close()
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3]
    assert len((folder / METRICS).read_text().splitlines()) == 3


@pytest.mark.parametrize("line", ["", "note to self", '{"kind": "train"}', "\x00" * 9])
def test_a_damaged_line_costs_that_line_alone(folder, line):
    """A restart writes all the others again."""
    started(folder, [1, 2, 3])
    first, *rest = (folder / METRICS).read_text().splitlines()
    (folder / METRICS).write_text("\n".join([first, line, *rest, ""]))
    Run(folder, SAVED, resume_step=3).close()
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3]


def test_metrics_of_a_folder_without_any(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_goes_on_after_a_restart(folder):
    started(folder, [1, 2, 3])
    (before,) = folder.glob("events.*")
    before.rename(f"{before}-before")  # a file of the same second would have its name
    run = Run(folder, SAVED, resume_step=2)
    run.record("train", 3, loss=30.0)
    run.close()
    assert scalars(folder) == [
        ("train/loss", 1, 1.0),
        ("train/loss", 2, 0.5),
        ("train/loss", 3, 30.0),  # the first one, of 1/3, is hidden
    ]
    assert [step for _, step, _ in texts(folder)] == [0, 3]


def test_tensorboard_has_groups(folder):
    run = Run(folder, SAVED)
    run.record("train", 1, loss=1.0, forward_nfe=6.0, jac_loss=0.5, tokens_per_s=9.0, memory_mib=4)
    run.record("valid", 1, loss=2.0, rel_residual=0.25, sradius=0.75)
    run.close()
    assert scalars(folder) == [
        ("train/loss", 1, 1.0),
        ("solver/train_forward_nfe", 1, 6.0),
        ("jacobian/train_jac_loss", 1, 0.5),
        ("speed/train_tokens_per_s", 1, 9.0),
        ("speed/train_memory_mib", 1, 4.0),
        ("valid/loss", 1, 2.0),
        ("solver/valid_rel_residual", 1, 0.25),
        ("jacobian/valid_sradius", 1, 0.75),
    ]


# ---- memory ----------------------------------------------------------------------------------


def test_peak_memory_is_in_mib():
    cpu = torch.device("cpu")
    before = peak_memory_mib(cpu)
    assert 50 < before < 50_000
    block = torch.ones(int(before + 256) * 2**18)  # MiB of float32
    assert peak_memory_mib(cpu) > block.numel() * 4 / 2**20
