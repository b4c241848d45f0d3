"""plan_training.py: its counts against ones made by hand and the profiler's, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plan_training
from deq_sequence.options import parse
from lib.errors import InputError
from planner.check import check
from planner.counting import Flops, count_flops, evaluations, solver_states
from planner.gpus import GPUS, measured_rates
from planner.hours import step_on
from planner.live_bytes import LiveBytes
from planner.plan import make_plan
from planner.report import _adding, as_dict, report
from planner.runs import IMAGES, TEXTS, find_run, known_runs, most_evaluations

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
    --d_model 32 --d_embed 32 --n_head 2 --d_head 16 --d_inner 2048 --div_val 2 --tgt_len 12
    --mem_len 20 --batch_size 8 --dataset ptb
""".split()


@pytest.fixture(scope="module")
def words():
    return find_run("wt103_reg", SMALL)


@pytest.mark.parametrize("name", known_runs())
def test_known_runs(name):
    run = find_run(name, [])
    assert run.batch >= 8
    assert run.border >= 0
    if run.words or run.settings.DATASET.DATASET in IMAGES:
        assert run.steps >= run.stacked_steps > 0


def test_the_published_runs():
    words, images = find_run("wt103_reg", []), find_run("imagenet_SMALL_reg", [])
    assert words.published == "wt103_deq_transformer_reg"
    assert (words.steps, words.stacked_steps, words.batch, words.units) == (
        300_000,
        32_000,
        56,
        150,
    )
    assert words.thresholds == (11.0, 13)
    assert words.drawn_thresholds == (10, 12)
    assert images.drawn_thresholds == (12, 15)
    assert find_run("imagenet_SMALL", []).drawn_thresholds == (26, 26)  # no Jacobian loss
    assert words.size == TEXTS["wt103"]
    assert images.published == "imagenet/cls_mdeq_SMALL_reg"
    assert images.batch == 128
    assert images.steps == images.settings.TRAIN.END_EPOCH * -(-1_281_167 // 128)
    assert 0 < images.jac_share <= images.settings.LOSS.JAC_LOSS_FREQ


def test_flops_of_words_by_hand(words):
    flops, parameters = count_flops(words)
    d, inner, queries, memory = 32, 2048, 12, 20
    keys = queries + memory
    products = queries * (3 * d * d + d * d + 2 * d * inner)
    attention = queries * d * (2 * keys + keys + 1)  # scores, values, positions
    assert flops.forward == 2 * (products + attention)
    assert flops.forward <= flops.backward <= 1.1 * flops.forward
    assert flops.stacked > 2 * 3 * 2 * products  # two layers; backward costs two of them
    assert flops.jacobian > flops.forward
    assert flops.once > 2 * memory * d * 2 * d  # keys and values of the memory
    assert parameters > words.size[0] * 4


def test_a_gradient_without_a_solve():
    found = {}
    for grad in ("jfb", "phantom:steps=3,damping=0.5"):
        run = find_run("wt103_reg", [*SMALL, "--grad", grad])
        flops, _ = count_flops(run)
        assert flops.backward == evaluations(run, flops)[1] == 0
        found[grad] = flops.rest / flops.forward
    # Three steps instead of one: an evaluation more costs one forward and two backward.
    jfb, phantom = found.values()
    assert phantom - jfb == pytest.approx(6, abs=0.5)


def test_evaluations_and_histories():
    assert most_evaluations("anderson", 12) == 12
    assert most_evaluations("broyden", 18) == 19
    # Broyden keeps a vector per step; Anderson as many as its memory.
    grows = solver_states("broyden", 20) - solver_states("broyden", 10)
    assert grows == pytest.approx(10, abs=1)
    assert solver_states("anderson", 20) == pytest.approx(solver_states("anderson", 40), abs=0.1)
    assert solver_states("anderson:m=3", 20) < solver_states("anderson:m=6", 20)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes(device):
    x = torch.empty(256, device=device)
    with LiveBytes([x]) as live:
        y = x + 1
        assert live.live == 1024
        z = y.view(16, 16) * 2
        assert live.live == live.peak == 2048
        del y
        assert live.live == 1024
        z += 1
        assert x.view(2, 128).numel() == 256
    assert (live.live, live.peak) == (1024, 2048)


def test_the_page_shows_what_is_printed(capsys, tmp_path):
    """And of the published model, a step is what was measured."""
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    command, printed = page.split("```bash\n")[1].split("\n```\n\n```text\n")
    out = tmp_path / "plan.json"
    assert plan_training.main([*command.split()[2:], "--json", str(out)]) == 0
    assert capsys.readouterr().out == printed.split("```")[0]
    (plan,) = json.loads(out.read_text())
    time = plan["time"]
    found = measured_rates()["settings"]["wt103_deq_transformer_reg"]["formats"]["f32"]
    one, jacobian = found["equilibrium"], found["jacobian"]
    solves = one["forward_solve"] * 11 / 12 + one["backward_solve"]  # 11: the mean threshold
    rest = one["seconds"] - one["forward_solve"] - one["backward_solve"]
    extra = 0.35 * max(jacobian["seconds"] - one["seconds"], 0)
    assert time["measured"]
    assert not time["too_low"]
    assert time["peaks"] == {
        "stacked": found["stacked"]["peak_bytes"],
        "equilibrium": one["peak_bytes"],
        "with the Jacobian loss": jacobian["peak_bytes"],
    }
    # The printed parts have the printed sum, and say how the measured ones became these.
    lines = printed.split("\n  equilibrium  ")[1].split("\n  the run")[0]
    total, *parts = (float(line.split(" ms")[0].split()[-1]) for line in lines.splitlines())
    assert total == pytest.approx(sum(parts), abs=1e-6)
    solve, extra_ms = 1e3 * one["forward_solve"], 1e3 * extra / 0.35
    assert f"11/12 of {solve:.1f} ms: 12 evaluations were measured" in lines
    assert f"35 % of {extra_ms:.1f} ms" in lines
    assert f"takes {1e3 * one['seconds']:.1f} ms on one GPU, without the Jacobian loss" in printed
    assert time["equilibrium"] == pytest.approx(solves + rest + extra)
    assert time["stacked"] == pytest.approx(found["stacked"]["seconds"])
    assert time["transfer"] == pytest.approx(1.5 * 4 * plan["parameters"] / 450e9)
    seconds = time["stacked"] + time["transfer"]
    assert time["hours"]["stacked"] == pytest.approx(32_000 * seconds / 3600)
    assert (plan["samples_per_gpu"], plan["tokens"]) == (14, 300_000 * 56 * 150)
    # Another GPU has the same share of its peak.
    flops, run = Flops(**plan["flops"]), find_run("wt103_reg", [])
    slower = step_on(run, flops, (11, 13), 14, "f32", "a100")
    assert not slower.measured
    ratio = GPUS["h100"].peak["f32"] / GPUS["a100"].peak["f32"]
    assert slower.equilibrium == pytest.approx(ratio * time["equilibrium"])
    # Other solves were not measured.
    for flags, same in (
        ("--dropout 0.1", True),
        ("--f_thres 20", False),
        ("--f_solver broyden", False),
    ):
        changed = find_run("wt103_reg", flags.split())
        step = step_on(changed, flops, evaluations(changed, flops), 14, "f32", "h100")
        assert step.measured == bool(step.phases) == same


def test_the_sum_is_that_of_the_rounded_parts():
    assert _adding([0.597, 22.751], 1) == ["0.6", "22.8", "23.4"]
    assert _adding([1 / 3, 1 / 3, 1 / 3], 2) == ["0.33", "0.33", "0.33", "0.99"]
    assert _adding([1234.5], 1) == ["1,234.5", "1,234.5"]
    assert _adding([0.0, 0.0], 0) == ["0", "0", "0"]


def test_another_model_is_an_estimate(words, capsys):
    assert plan_training.main(["--run", "wt103_reg", "--gpu", "h100", "--", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "time (ESTIMATE: wt103_deq_transformer_reg at 14 samples" in printed
    assert "several times too low" in printed  # so small a model


def test_a_run_that_does_not_fit(words):
    plan = make_plan(words, 1, "h100", "f32")
    assert plan.fits
    assert "DOES NOT FIT" not in report(plan)
    less = replace(plan, gpu=replace(plan.gpu, memory=max(plan.memory.peaks.values()) - 1))
    assert "DOES NOT FIT" in report(less)
    assert not as_dict(less)["fits"]


@pytest.mark.slow
def test_a_large_model_has_a_large_stand_in():
    one = find_run("cityscapes_XL", [])
    step = step_on(one, count_flops(one)[0], (27, 29), 4, "f32", "h100")
    assert step.basis.startswith("cityscapes/seg_mdeq_LARGE at 3 samples")


def test_the_folder_of_a_run(tmp_path):
    args = vars(parse(SMALL)) | {"vocabulary": "0", "cutoffs": []}
    (tmp_path / "settings.json").write_text(json.dumps(args))
    run = find_run(str(tmp_path), ["--batch_size", "16"])
    assert (run.batch, run.settings.d_inner, run.size) == (16, 2048, TEXTS["ptb"])
    folder = tmp_path / "images"
    folder.mkdir()
    cfg = find_run("cifar_TINY", ["DEQ.F_THRES", "7"]).settings
    (folder / "config.yaml").write_text(cfg.dump())
    assert find_run(str(folder), []).thresholds[0] == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_profiler_agrees():
    """On a small model: that of the published ones takes minutes."""
    small = [*SMALL, "--d_model", "64", "--n_head", "4", "--d_embed", "64"]
    within_five_percent(check(find_run("wt103_reg", small)))


def within_five_percent(records):
    for record in records:
        for name in ("flops", "kept_bytes"):
            found = record[name]
            assert found["counted"] == pytest.approx(found["profiler"], rel=0.05), record
        if record["phase"] != "stacked":
            assert record["evaluations"]["counted"] == record["evaluations"]["profiler"]


SETTINGS = ["wt103_reg", "wt103", "cifar_TINY", "cifar_LARGE_reg", "imagenet_SMALL",
            "cityscapes_SMALL"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_profiler_agrees_at_full_width(name):
    within_five_percent(check(find_run(name, [])))


def test_the_page_lists_all_settings_within_five_percent():
    text = (ROOT / "docs/data/planner_check.json").read_text(encoding="utf-8")
    records = json.loads(text)["records"]
    assert {record["run"] for record in records} == set(SETTINGS)
    within_five_percent(records)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--run wt103_rex", "did you mean wt103_reg?"),
        ("--run nothing_alike", "choose from wt103, "),
        ("--run wt103 --gpu h10", "did you mean h100?"),
        ("--run wt103 --gpu v100 --amp bf16", "it computes in f32"),
        ("--run wt103 --gpus 57", "cannot share a batch of 56"),
        ("--run wt103 --gpus 0", "--gpus is 0"),
        ("--run wt103 --json /no/such/folder/x.json", "there is no folder"),
        ("--run wt103 --json docs", "docs is a folder"),
        ("--run wt103 --gpu H100", "did you mean h100?"),
        ("--run wt103,", "no run or file ''"),
        ("--run wt103 -- --n_heads 3", "did you mean --n_head?"),
        ("--run cifar_TINY -- DEQ.F_THRESH 3", "DEQ.F_THRES"),
        ("--run wt103 -- --grad unroll", "cannot be planned"),
        ("--run DEQ-Sequence/state_tracking.sh -- --dataset state:S3", "plan a run on text"),
        ("--run DEQ-Sequence/launch.sh", "has no list settings"),
        ("--run docs", "neither settings.json nor config.yaml"),
        ("--gpus 4", "--run"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan_training.main(flags.split()) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_names_of_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    by_file = find_run("MDEQ-Vision/experiments/cifar/cls_mdeq_TINY.yaml", [])
    assert by_file.published == find_run("cifar_TINY", []).published
    with pytest.raises(InputError, match="did you mean cifar_TINY"):
        find_run("cifar_TINI", [])
