"""What TensorBoard shows of a language model: a generated text at each validation, the curves."""

import pytest

from deq_sequence import events
from deq_sequence.events import TextEvents
from events import pictures, scalars, texts
from lib.runs.checkpoint import load
from lib.runs.run_folder import WEIGHTS, read_metrics
from test_training import GOLDEN_FLAGS, assert_same


def of_steps(found, tag):
    return [step for name, step, _ in found if name == tag]


def test_each_validation_has_a_text(train, run_folder, monkeypatch):
    """And a run without them is the same, bit for bit."""
    with_texts = train(*GOLDEN_FLAGS.split(), "--dropout", "0.1")
    steps = [r["step"] for r in with_texts if r["kind"] == "valid"]
    found = [entry for entry in texts(run_folder) if entry[0].startswith("generated")]
    assert of_steps(found, "generated text/text_summary") == steps
    assert all(text.startswith("`[") and len(text.split()) > 10 for _, _, text in found)
    assert found[0][2] != found[-1][2]  # the weights have changed
    monkeypatch.setattr(TextEvents, "sample", lambda *args: None)
    without = train(*GOLDEN_FLAGS.split(), "--dropout", "0.1", name="again")
    assert [r["loss"] for r in without if "loss" in r] == [
        r["loss"] for r in with_texts if "loss" in r
    ]
    assert_same(load(run_folder / WEIGHTS), load(run_folder.parent / "again" / WEIGHTS))


def test_a_restart_doubles_nothing(train, run_folder, monkeypatch):
    monkeypatch.setattr(events, "_PAUSE", 0.0)
    train(*GOLDEN_FLAGS.split(), "--max_step", "4", "--eval-interval", "2")
    train(*GOLDEN_FLAGS.split(), "--max_step", "8", "--eval-interval", "2", "--restart")
    steps = [r["step"] for r in read_metrics(run_folder) if r["kind"] == "valid"]
    assert steps == sorted(set(steps))
    assert len(steps) >= 4
    assert of_steps(texts(run_folder), "generated text/text_summary") == steps
    drawn = pictures(run_folder)
    assert of_steps(drawn, "curves") == steps
    assert all(png.startswith(b"\x89PNG") for _, _, png in drawn)
    in_file = [(r["step"], r["loss"]) for r in read_metrics(run_folder) if r["kind"] == "train"]
    assert of_steps(scalars(run_folder), "train/loss") == [step for step, _ in in_file]
    shown = [value for name, _, value in scalars(run_folder) if name == "train/loss"]
    assert shown == pytest.approx([loss for _, loss in in_file])
