"""What the flags of training do, through both phases, on a text that a second suffices for.

The golden losses are the first twelve of one run, for each mode of tied projections. Whoever
changes numerics on purpose renews them in a commit of its own:

    RENEW_GOLDEN=1 python -m pytest tests/sequence/test_training.py -k golden
"""

import functools
import json
import math
import os
import shutil
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from deq_sequence.command import main
from deq_sequence.half_precision import slowdown
from deq_sequence.ties import TIE_PROJ_MODES
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, METRICS, SETTINGS, WEIGHTS, Run, read_metrics
from lib.solvers import broyden
from parameters import slow_but

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses.json"
GOLDEN_FLAGS = """
    --max_step 12 --pretrain_steps 6 --warmup_step 4 --wnorm --dropout 0.1 --dropatt 0.1
    --adaptive --cutoffs 20 80 --div_val 2 --jac_loss_weight 1 --jac_loss_freq 0.5
    --rand_f_thres_delta 2 --seed 7
"""


def of_kind(records, kind):
    return [r for r in records if r["kind"] == kind]


def losses(records):
    return [r["loss"] for r in of_kind(records, "train")]


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture
def no_files():
    run = Run(None, ("settings.json", "{}"))
    yield run
    run.close()


@pytest.fixture
def spy(make_trainer, no_files):
    """Train with flags; the trainer and what the model was given in each step (or chunk)."""

    def make(*flags):
        trainer, calls = make_trainer(*flags), []

        def record(data, target, mems, **options):
            calls.append({"data": data, "target": target, "mems": mems, **options})
            return trainer.model(data, target, mems, **options)

        trainer.parallel = record
        trainer.train(no_files)
        return trainer, calls

    return make


# ---- both phases -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--wnorm --dropout 0.1 --dropatt 0.1 --jac_loss_weight 1 --jac_loss_freq 1",
        "--pre_lnorm --wnorm --batch_chunk 2 --f_solver broyden --b_solver anderson",
        "--adaptive --div_val 2 --d_embed 8 --b_solver None --stop_mode abs --mem_len 0",
        "--not_tied --f_solver fixed_point_iteration --b_solver fixed_point_iteration",
        "--same_length --init uniform --emb_init uniform --clip_nonemb --varlen",
    ],
)
def test_a_run_crosses_the_border(train, run_folder, more):
    records = train("--eval-interval", 5, *more.split())
    steps = of_kind(records, "train")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert ["forward_nfe" in r for r in steps] == [False] * 3 + [True] * 3
    assert ["backward_nfe" in r for r in steps] == [False] * 3 + [True] * 3
    valid = of_kind(records, "valid")
    assert [(r["step"], r["phase"]) for r in valid] == [
        (3, "stacked"),
        (5, "equilibrium"),
        (6, "equilibrium"),
    ]
    assert [r["nfe"] > 0 for r in valid] == [False, True, True]
    best = min(valid[1:], key=lambda r: r["loss"])  # not the stacked one, however good it was
    (final,) = of_kind(records, "final_valid")
    assert final["loss"] == best["loss"]
    (test,) = of_kind(records, "final_test")
    assert all(math.isfinite(r["loss"]) for r in [*steps, *valid, test])
    assert test["loss"] < 6  # of an untrained model: about 5.3, and the rate here is high
    assert set(os.listdir(run_folder)) > {LOG, METRICS, SETTINGS, CHECKPOINT, WEIGHTS}


@pytest.mark.parametrize("pretrain", [0, 6, 7])
def test_runs_of_one_phase(train, pretrain):
    records = train("--pretrain_steps", pretrain)
    phases = {r["phase"] for r in of_kind(records, "valid")}
    assert phases == {"equilibrium" if pretrain == 0 else "stacked"}
    assert all(("forward_nfe" in r) == (pretrain == 0) for r in of_kind(records, "train"))


def test_it_learns(train):
    found = losses(train("--max_step", 120, "--pretrain_steps", 60, "--log-interval", 20))
    assert found[-1] < found[0] - 0.3
    assert max(found[3:]) < found[0]


OPTIMISERS = ["Adam", "SGD", "Adagrad", "RMSprop", "RAdam"]
SCHEDULES = ["cosine", "inv_sqrt", "dev_perf", "constant"]


@pytest.mark.parametrize(
    ("optim", "scheduler"),
    slow_but(zip(OPTIMISERS, [*SCHEDULES, "cosine"], strict=True), product(OPTIMISERS, SCHEDULES)),
)
def test_every_optimiser_with_every_schedule(make_trainer, no_files, optim, scheduler):
    flags = ("--optim", optim, "--scheduler", scheduler, "--warmup_step", 2, "--max_eval_steps", 1)
    trainer = make_trainer(*flags)
    before = weights(trainer)
    trainer.train(no_files)
    moved = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    # The lone cluster has no use for its bias; inv_freq is no parameter.
    assert moved >= {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_learning_rate_of_each_step(train):
    records = train("--scheduler", "constant", "--warmup_step", 4, "--lr", 0.008)
    rates = [r["lr"] for r in of_kind(records, "train")]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008, 0.008])


def test_text_is_read_in_order_with_memory(spy):
    trainer, calls = spy("--tgt_len", 200, "--mem_len", 300, "--max_step", 7)
    assert trainer.epoch == 1
    lengths = [len(call["data"]) for call in calls]
    assert lengths == [200, 200, 200, 200, 181, 200, 200]  # 982 rows of which 981 are predicted
    memory = [len(call["mems"][0]) if call["mems"] else 0 for call in calls]
    assert memory == [0, 200, 300, 300, 300, 0, 200]  # and a new pass begins without
    for before, after in pairwise(calls[:5]):
        assert torch.equal(before["target"][-1], after["data"][0])
    assert all(torch.equal(call["data"][1:], call["target"][:-1]) for call in calls)


def test_varlen(spy):
    flags = ("--varlen", "--tgt_len", 20, "--max_step", 60, "--pretrain_steps", 60)
    _, calls = spy(*flags)
    _, again = spy(*flags)
    lengths = [len(call["data"]) for call in calls]
    assert lengths == [len(call["data"]) for call in again]
    inside = [n for n, call in zip(lengths, calls[1:], strict=False) if call["mems"]]
    assert all(5 <= n <= 35 for n in inside)
    assert len(set(inside)) > 8
    for before, after in pairwise(calls):
        if after["mems"]:
            assert torch.equal(before["target"][-1], after["data"][0])


# ---- batch_chunk -----------------------------------------------------------------------------


@pytest.mark.parametrize("pretrain", [3, 0], ids=["stacked", "equilibrium"])
def test_chunks_of_a_batch_are_the_batch(make_trainer, no_files, pretrain):
    """In float64, with solvers far below the tolerance: they look at a chunk as a whole.

    The loss is averaged in float32, whose rounding does not reach the gradients here: the
    averages are over powers of two.
    """
    found = {}
    for chunks in (1, 4):
        trainer = make_trainer(
            *("--batch_chunk", chunks, "--pretrain_steps", pretrain, "--max_step", 2),
            *("--optim", "SGD", "--lr", 0.1, "--f_thres", 200, "--b_thres", 200),
            *("--max_eval_steps", 1, "--log-interval", 100),
        )
        trainer.model.double()
        trainer.model.f_solver = functools.partial(broyden, eps=1e-13)
        trainer.model.b_solver = functools.partial(broyden, eps=1e-13)
        trainer.train(no_files)
        found[chunks] = trainer
    one, other = found[1], found[4]
    # Kept in float64, but each part was rounded to float32: 4 x 6e-8.
    assert other.model.deq.stats.forward.rel_residual < 1e-11
    assert other._window["loss"] == pytest.approx(one._window["loss"], rel=3e-7)
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=1e-9, atol=1e-10)


def test_each_chunk_has_its_own_memory(spy):
    _, calls = spy("--batch_chunk", 2, "--max_step", 4)
    for i in range(2, 8):
        assert calls[i]["mems"][0].shape == (8, 2, 16)
        assert torch.equal(calls[i - 2]["target"][-1], calls[i]["data"][0])


# ---- Jacobian regularisation -----------------------------------------------------------------


@pytest.mark.parametrize(("freq", "draws"), [(0.0, 10), (0.4, 100), (1.0, 10)])
def test_jac_loss_freq(spy, freq, draws):
    flags = ("--jac_loss_weight", 1, "--jac_loss_freq", freq, "--f_thres", 2, "--b_thres", 1)
    _, calls = spy(*flags, "--max_step", 3 + draws, "--log-interval", 200)
    asked = [call["compute_jac_loss"] for call in calls]
    assert not any(asked[:3])  # stacked
    five_deviations = 5 * math.sqrt(draws * freq * (1 - freq))
    assert sum(asked[3:]) == pytest.approx(draws * freq, abs=five_deviations)


def test_jac_loss_is_recorded_where_it_was_used(train):
    records = of_kind(train("--jac_loss_weight", 1, "--jac_loss_freq", 1), "train")
    assert ["jac_loss" in r for r in records] == [False] * 3 + [True] * 3
    assert all(r["jac_loss"] > 0 for r in records[3:])
    without = of_kind(train("--jac_loss_freq", 1, name="no-weight"), "train")
    assert not any("jac_loss" in r for r in without)


def test_jac_loss_weight_enters_linearly(make_trainer, no_files):
    """One step of gradient descent without clipping: the weights move in proportion."""
    common = ("--pretrain_steps", 0, "--max_step", 1, "--optim", "SGD", "--lr", 0.1, "--clip", 0)
    found = []
    for weight in (0, 1, 2):
        trainer = make_trainer(*common, "--jac_loss_weight", weight, "--jac_loss_freq", 1)
        trainer.model.double()
        trainer.train(no_files)
        found.append(torch.nn.utils.parameters_to_vector(trainer.model.parameters()))
    one, two = found[1] - found[0], found[2] - found[0]
    assert one.norm() > 1e-5
    torch.testing.assert_close(two, 2 * one, rtol=1e-5, atol=1e-9)


def test_jac_loss_makes_the_jacobian_smaller(train):
    flags = ("--max_step", 30, "--pretrain_steps", 0, "--log-interval", 10, "--jac_loss_freq", 1)
    weak = of_kind(train(*flags, "--jac_loss_weight", 1e-9), "train")[-1]["jac_loss"]
    strong = of_kind(train(*flags, "--jac_loss_weight", 100, name="strong"), "train")[-1]
    assert strong["jac_loss"] < weak / 2


def test_jac_incremental(make_trainer):
    flags = ("--jac_loss_weight", 2, "--jac_loss_freq", 1, "--jac_incremental", 3)
    trainer, used = make_trainer(*flags, "--pretrain_steps", 2), []
    for trainer.step in range(2, 10):
        used.append(trainer.draw().jac_weight)
    # A step more for every multiple of 3 that is passed; of update n = 2, 3, ...
    assert used == pytest.approx([2, 2.1, 2.1, 2.1, 2.2, 2.2, 2.2, 2.3])


@pytest.mark.parametrize(("f_thres", "delta", "expected"), [(9, 3, {6, 7, 8, 9}), (2, 5, {1, 2})])
def test_rand_f_thres_delta(spy, f_thres, delta, expected):
    flags = ("--f_thres", f_thres, "--rand_f_thres_delta", delta)
    _, calls = spy(*flags, "--max_step", 60, "--pretrain_steps", 60)
    assert {call["f_thres"] for call in calls} == expected
    assert {call["b_thres"] for call in calls} == {6}


# ---- gradients -------------------------------------------------------------------------------


def gradients(trainer, run):
    """Those that the optimiser was given in the last step, by name."""
    trainer.train(run)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def norm(grads):
    return torch.stack([g.norm() for g in grads]).norm().item()


def test_clip(make_trainer, no_files):
    free = gradients(make_trainer("--max_step", 1, "--clip", 0), no_files)
    total = norm(free.values())
    assert total > 0.1
    clipped = gradients(make_trainer("--max_step", 1, "--clip", 0.1), no_files)
    assert norm(clipped.values()) == pytest.approx(0.1, rel=1e-4)
    for name, value in free.items():
        torch.testing.assert_close(clipped[name], value * 0.1 / total, rtol=1e-4, atol=1e-8)
    loose = gradients(make_trainer("--max_step", 1, "--clip", 2 * total), no_files)
    assert_same(loose, free)


def test_clip_nonemb(make_trainer, no_files):
    flags = ("--max_step", 1, "--adaptive", "--div_val", 2)
    free = gradients(make_trainer(*flags, "--clip", 0), no_files)
    clipped = gradients(make_trainer(*flags, "--clip", 0.01, "--clip_nonemb"), no_files)
    tables = {name for name in free if name.startswith("word_emb.")}
    assert tables
    assert_same({n: clipped[n] for n in tables}, {n: free[n] for n in tables})
    assert norm(clipped[n] for n in free if n not in tables) == pytest.approx(0.01, rel=1e-3)


def test_amp_is_close(train):
    exact = losses(train("--dropout", 0.1))
    half = losses(train("--dropout", 0.1, "--amp", "bf16", name="half"))
    assert exact != half
    assert half == pytest.approx(exact, rel=0.02)  # bfloat16 has 8 bits


def test_the_log_says_where_bf16_is_slower(flags, capsys):
    """In a model this small, conversions cost more than products, on every processor."""
    slower = "--amp bf16 is slower than float32 here"
    for amp in ("none", "bf16"):
        assert main([*flags, "--debug", "--max_step", "1", "--amp", amp]) == 0
        assert (slower in capsys.readouterr().out) == (amp == "bf16")


def test_the_measurement_of_bf16_leaves_the_model_alone(make_trainer):
    model = make_trainer("--dropout", 0.3).model.train()
    before = torch.get_rng_state()
    assert 0.01 < slowdown(model, 2, 6, 8) < 100
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


# ---- evaluation ------------------------------------------------------------------------------


def test_max_eval_steps(train):
    three = train("--max_eval_steps", 3)
    assert {r["tokens"] for r in three if "tokens" in r} == {3 * 4 * 16}
    every = train("--max_eval_steps", -1, name="all")
    (valid, _), (test,) = of_kind(every, "valid"), of_kind(every, "final_test")
    assert {valid["tokens"], test["tokens"]} == {(786 // 4 - 1) * 4}


def test_spectral_radius_is_reported_and_changes_nothing(train):
    plain = train("--max_eval_steps", 2)
    radius = train("--max_eval_steps", 2, "--spectral_radius_mode", name="radius")
    assert losses(plain) == losses(radius)
    found, expected = (
        [r for r in records if r["kind"] not in ("train", "summary")] for records in (radius, plain)
    )
    assert [r["loss"] for r in found] == [r["loss"] for r in expected]
    assert [("sradius" in r) for r in found] == [False, True, True, True]  # first: stacked
    assert all(0 < r["sradius"] < 100 for r in found[1:])
    assert not any("sradius" in r for r in plain)


def test_evaluation_leaves_training_alone(train):
    """However often one looks, training goes on the same."""
    flags = ("--dropout", 0.1, "--jac_loss_weight", 1, "--jac_loss_freq", 0.5, "--max_step", 10)
    rarely = train(*flags)
    often = train(*flags, "--eval-interval", 1, name="often")
    assert losses(rarely) == losses(often)
    assert len(of_kind(often, "valid")) == 10


def test_characters_are_reported_in_bits(flags, corpus_folder, tmp_path, capsys):
    folder = tmp_path / "text8"
    shutil.copytree(corpus_folder, folder)
    assert main([*flags, "--dataset", "text8", "--data", str(folder)]) == 0
    (final,) = of_kind(read_metrics(tmp_path / "runs-text8" / "run"), "final_test")
    shown = capsys.readouterr().out
    assert f"bpc {final['loss'] / math.log(2):.5f}" in shown
    assert "ppl" not in shown


# ---- files -----------------------------------------------------------------------------------


def test_debug_writes_no_file(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--debug"]) == 0
    assert os.listdir(tmp_path) == []
    assert "end of training | test" in capsys.readouterr().out


def test_settings_beside_the_checkpoint(train, run_folder):
    train("--adaptive", "--lr", 0.003)
    settings = json.loads((run_folder / SETTINGS).read_text())
    assert settings["lr"] == 0.003
    assert settings["d_embed"] == 16  # resolved, not -1
    assert settings["cutoffs"] == [12, 24, 120]
    assert settings["seed"] == 1111


def test_start_train_steps(train, run_folder):
    """With --load: weights of another run, counted on from there, in the right phase."""
    train()
    flags = ("--load", run_folder / WEIGHTS, "--start_train_steps", 4)
    records = train(*flags, "--scheduler", "constant", "--warmup_step", 10, name="more")
    steps = of_kind(records, "train")
    assert [r["step"] for r in steps] == [5, 6]
    assert [r["lr"] for r in steps] == pytest.approx([0.005, 0.006])
    assert all("forward_nfe" in r for r in steps)


def test_load_starts_from_those_weights(train, run_folder):
    (one,) = of_kind(train(), "final_test")
    loaded = train("--load", run_folder / WEIGHTS, "--max_step", 0, "--seed", 3, name="same")
    (two,) = of_kind(loaded, "final_test")
    assert two["loss"] == one["loss"]


def diverge(flags, *more) -> int:
    return main([*flags, "--lr", "1e20", "--max_step", "12", "--pretrain_steps", "0", *more])


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
def test_divergence_stops_the_run(flags, capsys):
    assert diverge(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "10 steps in a row were not finite, the last one at step 11: lower --lr" in line


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
def test_divergence_leaves_a_good_checkpoint(flags, run_folder, capsys):
    """The message says so: "the last good state is in ..."."""
    assert diverge(flags, "--log-interval", "10", "--save-interval", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the last good state is {run_folder / CHECKPOINT}" in line
    state = load(run_folder / CHECKPOINT)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


# ---- same seed, same run ---------------------------------------------------------------------


def test_two_runs_agree_bit_for_bit(train, run_folder):
    one = train(*GOLDEN_FLAGS.split())
    two = train(*GOLDEN_FLAGS.split(), name="again")
    for record in one + two:
        for name in ("tokens_per_s", "memory_mib"):
            record.pop(name, None)
    assert one == two
    assert_same(load(run_folder / WEIGHTS), load(run_folder.parent / "again" / WEIGHTS))
    other = train(*GOLDEN_FLAGS.split(), "--seed", 8, name="other")
    assert losses(other) != losses(one)


@pytest.mark.parametrize("mode", TIE_PROJ_MODES)
def test_golden_losses(train, mode):
    found = losses(train(*GOLDEN_FLAGS.split(), "--tie_proj_mode", mode))
    golden = json.loads(GOLDEN.read_text())
    if "RENEW_GOLDEN" in os.environ:
        golden[mode] = found
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    # Rounding differs between processors, and twelve steps hardly amplify it.
    assert found == pytest.approx(golden[mode], rel=1e-4)
    others = [golden[other] for other in TIE_PROJ_MODES if other != mode]
    assert all(found != pytest.approx(other, rel=1e-4) for other in others)
