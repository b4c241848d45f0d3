"""scaling_estimate.py: its counts against ones made by hand, its model, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import scaling_estimate
import torch
from helpers.cluster import (
    Hardware,
    Measured,
    efficiency,
    expected_maximum,
    filled_of,
    run_hours,
    spread_of,
    step_on,
    useful,
)
from helpers.work import Cost, buckets, count, counted, most_evaluations
from torch import nn

from lib.solvers import SOLVERS

ROOT = Path(__file__).parents[2]
GPU = Hardware(launch=0, wait=0, latency=0, memory=math.inf)
CIFAR, WORDS = "cifar/cls_mdeq_TINY", "wt103_deq_transformer_reg"


@pytest.fixture(scope="module")
def cifar():
    return count(CIFAR, "full")


@pytest.fixture(scope="module")
def words():
    return count(WORDS, "tiny")


def test_flops_and_operations_of_a_product():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    assert counted(lambda: layer(x)) == Cost(2 * 3 * 8 * 4, 1)
    # Backward adds that of the weight, and of the bias no product.
    assert counted(lambda: layer(x).sum().backward()).flops == 2 * 2 * 3 * 8 * 4


def test_counts_of_a_published_image_model(cifar):
    """f by hand: per branch of 24 channels, two convolutions to 120 and back and the last 1x1;
    fusion: a strided 3x3 down, a 1x1 up. 32 x 32 and 16 x 16 pixels."""
    pixels, width, wide = (32 * 32, 16 * 16), 24, 120
    block = sum(2 * p * (2 * 9 * width * wide + width * width) for p in pixels)
    fusion = 2 * pixels[1] * (9 * width * width + width * width)
    assert cifar.forward.flops == block + fusion
    assert cifar.backward.flops == cifar.forward.flops  # a vector-Jacobian product: no weights
    assert cifar.state == sum(pixels) * width
    assert (cifar.batch, cifar.gpus, cifar.steps) == (128, 2, 50 * math.ceil(50_000 / 128))
    assert (cifar.f_evals, cifar.b_evals) == (19, 20)


def test_counts_of_a_language_model(words):
    """Of the tiny size: width 16, two heads of 8, 32 inside, 6 queries, 8 + 6 keys."""
    d, inner, queries, keys = 16, 32, 6, 14
    products = queries * (3 * d * d + d * d + 2 * d * inner)
    attention = queries * d * (2 * keys + keys + 1)  # scores, values, positions
    assert words.forward.flops == 2 * (products + attention)
    assert words.batch == 56
    assert words.f_evals == 12 - 2 / 2
    assert words.jac_share == 0.35
    assert words.gradient_bytes == 4 * words.parameters


def test_gradients_are_collected():
    mib = 2**20
    assert buckets([100]) == 1
    assert buckets([10 * mib, 20 * mib, mib]) == 2  # the last one alone, the others together
    assert buckets([5, 30 * mib, 30 * mib, 30 * mib]) == 4


@pytest.mark.parametrize("name", SOLVERS)
def test_most_evaluations(name):
    found = SOLVERS[name](lambda z: z.flip(1) + 1, torch.randn(1, 9), threshold=7, eps=0.0)
    assert found["nfe"] + found["products"] <= most_evaluations(name, 7) <= 8


def test_a_step_by_hand(cifar):
    """Without overheads a step is its arithmetic, and what the gradients travel."""
    measured = Measured(utilisation=0.25)
    for n in (1, 4, 16):
        share = 128 // n
        step = step_on(cifar, n, share, "bf16", GPU, measured, False)
        assert step.compute == pytest.approx(4 * cifar.flops(share) / 312e12)
        link = 25e9 if n > 8 else 300e9
        assert step.transfer == pytest.approx(2 * (n - 1) / n * 4 * cifar.parameters / link)
        assert step.launches == step.latency == 0
    assert step.limit == "compute"
    slow = replace(GPU, launch=1.0)
    step = step_on(cifar, 1, 1, "bf16", slow, measured, True)
    assert step.seconds == pytest.approx(cifar.stacked.kernels)  # seconds each
    assert step.limit == "launches"


def test_sharing_ends(cifar):
    ideal = replace(GPU, near=math.inf, far=math.inf)
    assert efficiency(cifar, 128, "bf16", ideal, Measured(1.0)) == pytest.approx(1)
    assert useful(cifar, "bf16", ideal, Measured(1.0)) == 128
    # Of three shares the largest has 43 samples.
    assert efficiency(cifar, 3, "bf16", ideal, Measured(1.0)) == pytest.approx(128 / (3 * 43))
    hours = run_hours(cifar, 2, "bf16", ideal, Measured(1.0))
    later = cifar.steps - cifar.stacked_steps
    flops = 128 * (later * cifar.flops() + cifar.stacked_steps * cifar.stacked.flops)
    assert hours == pytest.approx(flops / 312e12 / 3600)
    assert useful(cifar, "bf16", Hardware(), Measured(0.5)) < 128


def test_slowest_of_several_solves(cifar):
    assert expected_maximum([0.5, 1.0], 1) == 0.75
    assert expected_maximum([1.0, 0.5], 2) == pytest.approx((0.5 + 3 * 1.0) / 4)
    assert expected_maximum([0.5, 1.0], 1000) == pytest.approx(1)
    uneven = Measured(1.0, (0.5, 1.0), ([0.5, 1.5], [0.5, 1.5]))
    assert [uneven.evaluations(0, n) for n in (1, 2)] == pytest.approx([0.5, 0.625])
    assert [uneven.evaluations(1, n) for n in (1, 2)] == [1, 1]  # cut by the threshold
    one, two = (step_on(cifar, n, 64, "bf16", GPU, uneven, False).compute for n in (1, 2))
    longer = 64 * cifar.f_evals * cifar.forward.flops / 312e12
    assert two - one == pytest.approx((0.625 - 0.5) * longer)


def record_of(trainer, nfe):
    strong = {"each": [{"nfe": steps} for steps in nfe]}
    return {"trainer": trainer, "phases": {"equilibrium": {"strong": strong}}}


def test_evaluations_of_measured_runs(cifar):
    record = record_of("digits", [[[7, 10]], [[21, 10]]])
    assert spread_of(record) == ([0.5, 1.5], [1.0, 1.0])
    assert filled_of({"forms": {"fast": {"f_nfe": 9.5, "b_nfe": 21.0}}}, cifar) == (0.5, 1.0)


def test_command_with_measurements_and_a_page(tmp_path, capsys):
    train, scaling, page, out = (tmp_path / name for name in ("t", "s", "page.md", "out.json"))
    fast = {"floor": 1.0, "step": 4.0, "f_nfe": 9.5, "b_nfe": 21.0}
    figures = {"forms": {"fast": fast}}
    train.write_text(json.dumps([{"setting": CIFAR, **figures}]))
    scaling.write_text(json.dumps([record_of("digits", [[[7, 10]], [[21, 10]]])]))
    begin, end = (f"<!-- scaling_estimate.py: {which} -->" for which in ("begin", "end"))
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    flags = ["--settings", CIFAR, "--train", str(train), "--scaling", str(scaling)]
    assert scaling_estimate.main([*flags, "--page", str(page), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| measured" in printed
    assert "| 0.25 " in printed
    assert "| 0.50 / 1.00 " in printed
    assert "| 1.25 / 1.00 " in printed
    assert "ends at 128" in printed
    assert page.read_text() == f"before\n{begin}\n\n{printed.strip()}\n\n{end}\nafter\n"
    (found,) = json.loads(out.read_text())
    assert found["utilisation"] == 0.25
    assert list(found["gpu_hours"]["bf16"]) == ["4", "32"]


def test_without_measurements_it_says_so(capsys):
    assert scaling_estimate.main(["--tiny", "--settings", WORDS]) == 0
    printed = capsys.readouterr().out
    assert "no --train was given" in printed
    assert "ends at 56" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--settings", "cifar/cls_mdeq_TINI"], "did you mean cifar/cls_mdeq_TINY"),
        (["--train", "no-such-file"], "no-such-file"),
        (["--page", "README.md"], "needs the two lines"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert scaling_estimate.main(["--tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_page_has_what_is_counted(tmp_path):
    """The rows of the page that depend on no measurement are those that the command prints."""
    text = scaling_estimate.run(["--settings", "cifar/cls_mdeq_TINY,cifar/cls_mdeq_LARGE"])
    counted_part = text.split("### Counted")[1].split("###")[0]
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")

    def cells(line):
        return [cell.strip() for cell in line.split("|")]

    on_page = [cells(line) for line in page.splitlines()]
    rows = [cells(line) for line in counted_part.splitlines() if line.startswith("| cifar")]
    assert len(rows) == 2
    assert all(row in on_page for row in rows)
