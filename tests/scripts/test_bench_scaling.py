"""scripts/benchmarks/bench_scaling.py: what it counts is what travels, and the command works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_scaling import main, report, summarise
from helpers.scaling import Measured, Plan
from helpers.settings import SIZES, Options
from helpers.traffic import Traffic
from helpers.trainers import (
    batch_size,
    chosen_trainers,
    make_trainer,
    most_evaluations_of,
    next_step,
)

from lib.errors import InputError
from lib.runs.processes import Processes

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")

SCRIPT = Path(__file__).parents[2] / "scripts/benchmarks/bench_scaling.py"
OPTIONS = Options(size=SIZES["tiny"], device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["words", "wt103_deq_transformer_reg", "cifar/cls_mdeq_TINY"])
def test_trainers_cross_the_border(name):
    trainer = make_trainer(name, Processes(), OPTIONS, batch=2, times=2, stacked=2)
    assert batch_size(trainer) == 4
    batches = trainer.batches()
    nfe = []
    for _ in range(3):
        next_step(trainer, batches)
        nfe.append((trainer.model.deq.stats.forward.nfe, trainer.model.deq.stats.backward.nfe))
    assert nfe[:2] == [(0, 0)] * 2
    assert all(0 < n <= most for n, most in zip(nfe[2], most_evaluations_of(trainer), strict=True))
    assert trainer.counts["skipped"] == 0


def test_trainers_go_on_beyond_an_epoch():
    trainer = make_trainer("digits", Processes(), OPTIONS, batch=4, times=1, stacked=9)
    trainer.position = trainer.n_batches - 1
    batches = trainer.batches()
    for _ in range(2):
        next_step(trainer, batches)
    assert (trainer.epoch, trainer.position) == (1, 1)


def test_names():
    assert chosen_trainers("quickstart,words") == ["words", "digits", "scenes"]
    assert len(chosen_trainers("scenes,images")) == 12


def test_summary_of_two_processes():
    """Process 0 is early at the first collective, process 1 at the second."""
    first = Measured(4, [9, 9], [1.0, 3.0], [(4, 2), (6, 2)], [[0.4, 0.1], [0.4, 0.1]])
    second = Measured(4, [9, 9], [1.0, 2.0], [(6, 2), (6, 4)], [[0.1, 0.3], [0.1, 0.3]])
    first.bytes = second.bytes = [{"gradients": 80}, {"gradients": 80}]
    first.calls = second.calls = [{"gradients": 1, "control": 2}] * 2
    found = summarise([first, second])
    assert found["seconds"] == 2.0  # of 1 and 3, as long as the slower process
    assert found["waiting"] == pytest.approx((0.5 + 0.4) / 2 * 2 / 4)
    assert found["travel"] == pytest.approx((0.1 + 0.1) * 2 / 4)
    assert found["bytes"] == {"gradients": 80, "batch norm": 0, "control": 0}
    assert found["nfe"] == [5.5, 2.5]
    assert found["slowest"] == pytest.approx([(6 / 5 + 1) / 2, (1 + 4 / 3) / 2])


def test_efficiencies():
    """One process takes 8 ms; two share it in 5, take twice as much in 10, and are apart in 9."""

    def figures(ms, batch):
        one = Measured(
            batch, [9, 9], [ms / 1000] * 3, [(1, 1)] * 3, [[0.0]] * 3, [{}] * 3, [{}] * 3
        )
        return summarise([one, one])

    times = {"one": (8, 4), "threads": (5, 4), "apart": (9, 4), "strong": (5, 4), "weak": (10, 8)}
    phase = {kind: figures(*each) for kind, each in times.items()}
    text = report(
        {"trainer": "words", "processes": 2, "steps": 3, "turn": 3, "phases": {"stacked": phase}}
    )
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    found = {row[1].strip(): row[6].strip() for row in rows}
    assert found == {"one": "1.00", "threads": "0.80", "apart": "0.89", "strong": "0.80",
                     "weak": "0.80"}  # fmt: skip


def test_a_plan_counts_whole_turns():
    assert Plan(lead=0, warmup=1, steps=5, turn=2).rounds == 3
    assert Plan(lead=0, warmup=1, steps=5, turn=2).each == 1 + 3 * 3


def test_one_process_sends_nothing():
    trainer = make_trainer("words", Processes(), OPTIONS, batch=None, times=1, stacked=1)
    traffic, batches = Traffic(), trainer.batches()
    traffic.watch(trainer.parallel)
    backward = torch.Tensor.backward
    with traffic.counted():
        next_step(trainer, batches)
    assert traffic == Traffic()
    assert torch.Tensor.backward is backward


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainers", "word"], "word"),
        (["--arrangements", "stron"], "did you mean strong"),
        (["--steps", "0"], "--steps is 0"),
        ([], "start it with torchrun"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    assert main(["--tiny", *flags]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert said in printed.err


def test_unknown_trainers_are_refused():
    with pytest.raises(InputError, match="quickstart"):
        chosen_trainers("sentences")


@pytest.mark.slow
def test_command(tmp_path):
    out = tmp_path / "out.json"
    flags = ["--tiny", "--trainers", "words,digits", "--arrangements", "apart,strong,weak"]
    flags += ["--steps", "2", "--turn", "1", "--lead", "1", "--warmup", "1", "--json", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(SCRIPT), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    words, digits = json.loads(out.read_text())
    assert (words["trainer"], digits["trainer"]) == ("words", "digits")
    assert done.stdout.count("| strong") == 4  # two trainers, two phases
    for record in (words, digits):
        for found in record["phases"].values():
            assert list(found) == ["one", "apart", "strong", "weak"]
            assert [len(each["each"]) for each in found.values()] == [1, 2, 2, 2]
            assert "bytes" in found["one"]
            assert found["one"]["bytes"]["gradients"] == found["apart"]["bytes"]["gradients"] == 0
            assert 0 < found["strong"]["travel"] <= found["strong"]["waiting"] < 1
            assert found["weak"]["batch"] == 2 * found["strong"]["batch"]
        tiny = make_trainer(record["trainer"], Processes(), OPTIONS, batch=None, times=1, stacked=1)
        sent = record["phases"]["equilibrium"]["strong"]["bytes"]
        # Every gradient travels, once; sums and events of a step as float64.
        assert sent["gradients"] == 4 * sum(p.numel() for p in tiny.model.parameters())
        assert sent["control"] % 8 == 0
    assert words["phases"]["stacked"]["strong"]["calls"]["gradients"] == 1  # less than a bucket
    assert words["phases"]["stacked"]["strong"]["bytes"]["batch norm"] == 0
    assert digits["phases"]["stacked"]["strong"]["bytes"]["batch norm"] > 0
    assert words["most"] == [6, 7]  # Anderson and Broyden with thresholds of 6
