"""The image tools on pretended GPUs: they compute what they do on the CPU."""

import pytest

from lib.runs.run_folder import read_metrics
from pretended_machine import pretended_machine
from small_runs import DIGITS, SCENES, TINY_DIGITS, TINY_SCENES, run_tool

SHORT = """
    TRAIN.END_EPOCH 1 TRAIN.PRETRAIN_STEPS 2 MODEL.DROPOUT 0.0 TRAIN.BATCH_SIZE 4 SAVE_FREQ 0
    PIN_MEMORY False WORKERS 0
""".split()


def losses(tool, cfg, folder, *overrides, gpus=0):
    argv = ["--cfg", cfg, *overrides, *SHORT, "OUTPUT_DIR", folder, "LOG_DIR", folder / "log"]
    if gpus:
        with pretended_machine(gpus):
            assert run_tool(tool, *argv) == 0
    else:
        assert run_tool(tool, *argv) == 0
    (records,) = folder.rglob("metrics.jsonl")
    return [r["loss"] for r in read_metrics(records.parent) if r["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "cfg", "tiny"),
    [("cls_train", DIGITS, TINY_DIGITS), ("seg_train", SCENES, TINY_SCENES)],
)
@pytest.mark.parametrize(("amp", "rel"), [("none", 1e-4), ("bf16", 3e-2)])
def test_training_is_the_cpus(tmp_path, tool, cfg, tiny, amp, rel):
    """On one GPU: on several, batch norm sees the batch in parts."""
    more = [*tiny, "AMP", amp]
    expected = losses(tool, cfg, tmp_path / "cpu", *more)
    assert len(expected) == 3
    assert losses(tool, cfg, tmp_path / "one", *more, gpus=1) == pytest.approx(expected, rel=rel)
