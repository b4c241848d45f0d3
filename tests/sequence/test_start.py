"""The learned start of a solve, and f(z) as the state in evaluation."""

from functools import partial
from pathlib import Path

import pytest
import torch

import deq_sequence
from deq_sequence.start import WIDTH, LearnedStart, distance
from export_weights import main as export
from lib.solvers import anderson, fixed_point_iteration
from small_model import EQUILIBRIUM, STACKED, build, words

WORDS = Path(__file__).parents[2] / "docs/models/words.safetensors"


def set_at_random(start, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def learned(**changes):
    """A small model whose start is far from zero."""
    model = build(f_start="learned", **changes).double()
    set_at_random(model.start)
    return model.eval()


@pytest.fixture
def tight():
    """The trained model of the repository with another start, solved to 1e-7, and some words."""
    trained = deq_sequence.load(WORDS)
    model = trained.model.double()
    model.start = LearnedStart(model.d_model).double()
    set_at_random(model.start, 0.1)
    model.f_solver = partial(anderson, eps=1e-7)
    return model, trained.encode("the value of the object is a list of names")[:, None]


def gradients(model, step=EQUILIBRIUM):
    loss = model.train()(*words(), [], step)[0]
    loss.sum().backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


# ---- the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [STACKED, EQUILIBRIUM], ids=["stacked", "equilibrium"])
def test_the_rest_of_the_model_is_trained_as_without(step):
    """At first h(u) is zero, so both models compute the same; h alone has a gradient more."""
    loss, found = gradients(build(f_start="learned", grad="jfb"), step)
    expected_loss, expected = gradients(build(grad="jfb"), step)
    assert torch.equal(loss, expected_loss)
    own = {name for name in found if name.startswith("start.")}
    assert found.keys() - own == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert all(found[name].isfinite().all() for name in own)
    assert found["start.mix"].any()
    assert found["start.bias"].any()


def test_clipping_leaves_the_start_out(make_trainer):
    """Steps that clip: the weights beside h are those of a run without h, bit for bit."""
    weights = []
    for more in ([], ["--f_start", "learned"]):
        trainer = make_trainer("--clip", 1e-3, "--max_step", 3, *more)
        trainer.model.train()
        batches = trainer.batches()
        for _ in range(3):  # of the stacked phase, which begins at zeros
            trainer.update(next(batches))
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
    assert weights[1]["start.bias"].any()


def test_both_starts_lead_to_the_same_fixed_point(tight):
    model, data = tight
    found = model.log_probs(data, f_thres=200)
    assert model.deq.stats.forward.last["rel_residual"] < 1e-7
    early = model.log_probs(data, f_thres=2)
    model.start = None
    torch.testing.assert_close(found, model.log_probs(data, f_thres=200), rtol=0, atol=1e-4)
    assert (early - model.log_probs(data, f_thres=2)).abs().max() > 1


def test_the_start_sees_no_later_word():
    model = learned(f_solver=fixed_point_iteration)  # a position takes no part in another's step
    data = words(length=12)[0]
    changed = data.clone()
    changed[8:] = (data[8:] + 1) % 17
    one, two = (model.log_probs(d, f_thres=2) for d in (data, changed))
    assert torch.equal(one[:8], two[:8])
    assert not torch.equal(one[8], two[8])


def test_word_by_word_is_the_whole_sequence(tight):
    (model, data), rows, mems = tight, [], []
    for word in data:
        scores, mems = model.log_prob(word[None], mems, f_thres=200)
        rows.append(scores)
    whole = model.log_probs(data, f_thres=200)
    torch.testing.assert_close(torch.stack(rows), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [1, WIDTH, 11])
def test_the_start_goes_on_over_the_memory(cut):
    start, us = learned().start, torch.randn(2, 12, 24, dtype=torch.float64)
    whole = start(us, 12)
    torch.testing.assert_close(start(us[:, :cut], cut), whole[:, :cut])
    torch.testing.assert_close(start(us, 12 - cut), whole[:, cut:])


def test_the_random_numbers_of_the_model_are_those_without():
    torch.manual_seed(1)
    LearnedStart(8)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_half_precision():
    """Under autocast the guess is rounded; states and losses are not."""
    model = build(f_start="learned", grad="jfb")
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_, z_mem, _ = model.train()(*words(), [], EQUILIBRIUM)
    assert loss.dtype == z_mem.dtype == torch.float32
    loss.sum().backward()
    assert model.start.bias.grad.any()


def test_it_learns(make_trainer):
    trainer = make_trainer("--f_start", "learned", "--max_step", 40, "--pretrain_steps", 10)
    trainer.model.train()
    batches, model = trainer.batches(), trainer.model
    for _ in range(30):
        trainer.update(next(batches))
    data = next(batches)[0]
    residuals = []
    for start in (model.start, None):
        model.start = start
        model.log_probs(data, f_thres=1)
        residuals.append(model.deq.stats.forward.last["rel_residual"])
    assert residuals[0] < 0.8 * residuals[1]


def test_the_distance_to_a_state_of_zeros_has_a_finite_gradient():
    guess = torch.zeros(2, 3, requires_grad=True)
    distance(guess, torch.zeros(2, 3)).backward()
    assert guess.grad.tolist() == [[0.0] * 3] * 2


# ---- the state in evaluation -------------------------------------------------------------------


def test_the_value_is_one_evaluation_further():
    """Three evaluations from zeros are a stack of three layers."""
    model = build(eval_n_layer=3, eval_state="value", f_solver=fixed_point_iteration).eval()
    data = words()[0]
    found = model.log_probs(data, f_thres=3)
    assert model.deq.stats.forward.last["nfe"] == 3
    assert torch.equal(found, model.log_probs(data, train_step=STACKED))


def test_the_value_is_the_state_of_training():
    model, (data, target) = build(eval_state="value", pre_lnorm=True), words()
    trained = model.train()(data, target, [], f_thres=4)[0]
    assert torch.equal(model.eval()(data, target, [], f_thres=4)[0], trained)


def test_a_better_point_than_the_last_is_kept():
    def solver(f, x0, threshold, **options):
        first = f(x0)
        f(100 + first)
        return {"result": first, "nstep": 1, "abs_trace": [1.0, 1.0], "rel_trace": [1.0, 1.0]}

    found = [
        build(f_solver=solver, eval_state=state).eval().log_probs(words()[0])
        for state in ("point", "value")
    ]
    assert torch.equal(*found)


def test_a_gradient_in_evaluation():
    model = build(eval_state="value", f_solver=fixed_point_iteration).eval()
    found = model(*words(), [], f_thres=3)[0]
    assert torch.equal(found.detach(), model(*words(), [], f_thres=3)[0].detach())
    found.sum().backward()
    assert model.inject_conv.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_samples_that_stop_alone():
    """The state of a sample is f(z) of its own last point, whenever the others stop."""
    solver = partial(anderson, eps=1e-2, stop="sample")
    model = build(eval_state="value", f_solver=solver).double().eval()
    data = words()[0]
    found = model.log_probs(data, f_thres=40)
    alone = []
    counts = []
    for column in data.split(1, dim=1):
        alone.append(model.log_probs(column, f_thres=40))
        counts.append(model.deq.stats.forward.last["nfe"])
    assert min(counts) < max(counts)  # so that some go on when others have left
    torch.testing.assert_close(found, torch.cat(alone, dim=1), atol=1e-9, rtol=0)


# ---- commands ----------------------------------------------------------------------------------


def test_a_run_and_its_export(train, run_folder, tmp_path):
    records = train("--f_start", "learned", "--eval_state", "value", "--f_thres", 2)
    assert {r["kind"]: r for r in records}["final_test"]["nfe"] == 2
    assert export([str(run_folder), str(tmp_path / "w.safetensors")]) == 0
    page = (tmp_path / "w.md").read_text("utf-8")
    for path in (run_folder, tmp_path / "w.safetensors"):
        trained = deq_sequence.load(path)
        assert trained.settings.f_start == "learned"
        assert trained.model.eval_state == "value"
        assert trained.model.start.mix.any()
        assert trained.generate("w1 w2", words=2, seed=1)
    assert "learned" in page
