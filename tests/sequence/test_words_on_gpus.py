"""The command on pretended GPUs: what it computes there, and how a run goes on elsewhere."""

import pytest
import torch

from deq_sequence.command import main
from lib.runs.determinism import deterministic
from lib.runs.run_folder import LOG, read_metrics
from pretended_machine import pretended_machine

SHORT = "--max_step 2 --pretrain_steps 1 --max_eval_steps 1 --batch_chunk 2".split()


def run(folder, argv, gpus=0):
    """Train on the CPU or so many GPUs; the losses of the steps."""
    if gpus:
        with pretended_machine(gpus):
            assert main([*argv, "--cuda"]) == 0
    else:
        assert main(argv) == 0
    return [r["loss"] for r in read_metrics(folder) if r["kind"] == "train"]


def test_several_gpus_in_bfloat16_and_then_one(flags, run_folder):
    """The first GPU has no sequence of its own: 1 of them is less than one a chunk."""
    flags = [*flags, *SHORT, "--amp", "bf16"]
    expected = run(run_folder.with_name("cpu"), [*flags, "--name", "cpu"])
    found = run(run_folder, [*flags, "--multi_gpu", "--gpu0_bsz", "1"], gpus=2)
    # float16, which PyTorch's threads would take, rounds by less than bfloat16: see the tests of
    # lib.data_parallel for that.
    assert found == pytest.approx(expected, rel=2e-3)
    more = ["--max_step", "3", "--restart"]
    assert len(run(run_folder, [*flags, *more], gpus=1)) == 3
    assert (
        "1 GPU(s) continue(s) what 2 GPU(s) began, so the run is not bit for bit"
        in (run_folder / LOG).read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize(
    ("gpus", "more"),
    [(1, []), (3, ["--multi_gpu"]), (3, ["--multi_gpu", "--gpu0_bsz", "1", "--batch_chunk", "2"])],
)
def test_training_is_the_cpus(flags, run_folder, gpus, more, amp):
    flags = [*flags, "--amp", amp]
    expected = run(run_folder.with_name("cpu"), [*flags, "--name", "cpu"])
    assert run(run_folder, [*flags, *more], gpus) == pytest.approx(
        expected, rel=1e-6 if amp == "none" else 3e-3
    )


def test_deterministic_kernels_are_switched_on(flags, run_folder):
    """On the CPU, where they change nothing but the switch."""
    losses = []
    try:
        for name, more in (("run", ["--deterministic"]), ("other", [])):
            argv = [*flags, *SHORT, "--name", name, *more]
            losses.append(run(run_folder.with_name(name), argv))
            assert torch.are_deterministic_algorithms_enabled() == bool(more)
    finally:
        deterministic(False)
    assert losses[0] == losses[1]
