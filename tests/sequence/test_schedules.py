"""The learning rate of every update, and the optimisers."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from deq_sequence.options import parse
from deq_sequence.schedules import LearningRate, make_optimizer
from lib.runs.optimizers import restore_optimizer
from small_model import build

FUSED = ("Adam", "SGD", "Adagrad")  # on a CPU
OPTIMISERS = ("Adam", "SGD", "Adagrad", "RMSprop", "RAdam")
LR = 0.5


def make(*flags, optim="SGD"):
    args = parse(["--lr", str(LR), "--optim", optim, *map(str, flags)])
    optimizer = make_optimizer(args, nn.Linear(2, 2))
    return LearningRate(args, optimizer), optimizer


def rates(n, *flags):
    """The rates of the first ``n`` updates, as the optimiser sees them."""
    schedule, optimizer = make(*flags)
    found = []
    for step in range(n):
        returned = schedule.set(step)
        assert all(group["lr"] == returned for group in optimizer.param_groups)
        found.append(returned)
    return found


@pytest.mark.parametrize("scheduler", ["cosine", "inv_sqrt", "dev_perf", "constant"])
def test_warm_up_is_linear_from_the_first_update(scheduler):
    found = rates(10, "--scheduler", scheduler, "--warmup_step", 10, "--max_step", 1000)
    assert found == pytest.approx([LR * (n + 1) / 10 for n in range(10)])


@pytest.mark.parametrize("scheduler", ["cosine", "inv_sqrt", "dev_perf", "constant"])
def test_without_warm_up_the_first_update_has_the_full_rate(scheduler):
    assert rates(1, "--scheduler", scheduler, "--max_step", 100) == [LR]


def test_cosine_falls_to_eta_min():
    found = rates(101, "--warmup_step", 10, "--max_step", 100, "--eta_min", 0.1)
    for n in range(10, 101):
        assert found[n] == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi * n / 100)) / 2)
    assert all(a > b for a, b in pairwise(found[10:]))
    assert found[50] == pytest.approx(0.3)
    assert found[100] == pytest.approx(0.1)
    assert make("--max_step", 100, "--eta_min", 0.1)[0].set(150) == pytest.approx(0.1)  # no rise


@pytest.mark.parametrize("warm_up", [0, 1, 10])
def test_constant_is_constant(warm_up):
    found = rates(200, "--scheduler", "constant", "--warmup_step", warm_up, "--max_step", 100)
    assert set(found[warm_up:]) == {LR}


def test_inverse_square_root():
    found = rates(1000, "--scheduler", "inv_sqrt", "--warmup_step", 100)
    assert found[99] == pytest.approx(LR)
    assert found[399] == pytest.approx(LR / 2)
    assert found[899] == pytest.approx(LR / 3)
    assert max(found) == pytest.approx(LR)
    without = rates(100, "--scheduler", "inv_sqrt")
    assert without == pytest.approx([LR / math.sqrt(n + 1) for n in range(100)])


def evaluations(losses, *flags, warm_up=0):
    """The rate after each of a list of validation losses, one after every update."""
    schedule, _ = make("--scheduler", "dev_perf", "--warmup_step", warm_up, *flags)
    found = []
    for n, loss in enumerate(losses):
        schedule.set(n)
        schedule.after_evaluation(loss, n + 1)
        found.append(schedule.set(n + 1))
    return found


def test_dev_perf_lowers_the_rate_when_nothing_is_gained():
    losses = [3, 2, 2.5, 2.5, 1, 1, 0.5]
    factors = [1, 1, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert evaluations(losses) == pytest.approx([LR * factor for factor in factors])


def test_dev_perf_has_patience():
    """``patience`` evaluations without gain are let pass; the next one lowers the rate."""
    losses = [3, 4, 4, 4, 4, 4, 4]
    factors = [1, 1, 1, 0.1, 0.1, 0.1, 0.01]
    found = evaluations(losses, "--patience", 2, "--decay_rate", 0.1)
    assert found == pytest.approx([LR * factor for factor in factors])
    gains = [3, 4, 4, 2, 4, 4]  # a gain in between starts the count anew
    assert set(evaluations(gains, "--patience", 2)) == {LR}


def test_dev_perf_stops_at_lr_min():
    assert evaluations([1] * 9, "--lr_min", 0.2)[-1] == pytest.approx(0.2)


def test_dev_perf_does_not_count_evaluations_in_the_warm_up():
    found = evaluations([1, 2, 3, 4], warm_up=4)
    assert found == pytest.approx([LR * 2 / 4, LR * 3 / 4, LR, LR])


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_dev_perf_counts_from_the_first_evaluation_after_the_warm_up(warm_up):
    """The evaluation at the border still is of the warm-up: what it found is no mark to beat."""
    border = [9.0] * max(warm_up - 1, 0) + [1.0] * (warm_up > 0)  # after updates 1 ... warm_up
    found = evaluations([*border, 2, 2.5, 2.5, 1], warm_up=warm_up)
    assert found[warm_up:] == pytest.approx([LR, LR / 2, LR / 4, LR / 4])


def test_dev_perf_state_round_trip():
    flags = ("--scheduler", "dev_perf", "--patience", 1)
    one, _ = make(*flags)
    for loss in (1, 2):
        one.after_evaluation(loss, 1)
    two, _ = make(*flags)
    two.load_state_dict(one.state_dict())
    for schedule in (one, two):
        schedule.after_evaluation(2, 2)
        assert schedule.set(2) == pytest.approx(LR / 2)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({"--lr": LR / 10}, LR / 20, LR / 40),
        ({"--decay_rate": 0.1}, LR / 2, LR / 20),
        ({"--patience": 1}, LR / 2, LR / 2),
        ({"--lr_min": 0.3}, 0.3, 0.3),
    ],
)
def test_dev_perf_goes_on_with_the_settings_of_the_restart(changes, before, after):
    """After one decay; then there is one evaluation without gain."""
    schedule, _ = make("--scheduler", "dev_perf")
    for loss in (1, 2):
        schedule.after_evaluation(loss, 1)
    assert schedule.set(1) == LR / 2
    other, _ = make("--scheduler", "dev_perf", *(word for pair in changes.items() for word in pair))
    other.load_state_dict(schedule.state_dict())
    assert other.set(1) == pytest.approx(before)
    other.after_evaluation(2, 2)
    assert other.set(2) == pytest.approx(after)


def test_dev_perf_in_a_checkpoint_of_before():
    """The state of the plateau itself, whose settings do not count; and no state."""
    schedule, _ = make("--scheduler", "dev_perf", "--patience", 3)
    schedule.plateau.step(1)
    schedule.plateau._last_lr = [LR / 4]
    other, _ = make("--scheduler", "dev_perf")
    other.load_state_dict(schedule.plateau.state_dict())
    assert other.set(5) == LR / 4
    assert other.plateau.patience == 0
    other, _ = make("--scheduler", "dev_perf")
    other.load_state_dict({})
    assert other.set(5) == LR


def test_a_warm_up_that_a_restart_shortens():
    schedule, _ = make("--scheduler", "dev_perf", "--warmup_step", 100)
    schedule.set(50)
    other, _ = make("--scheduler", "dev_perf", "--warmup_step", 10)
    other.load_state_dict(schedule.state_dict())
    assert other.set(51) == LR


@pytest.mark.parametrize("scheduler", ["cosine", "inv_sqrt", "constant"])
def test_other_schedules_depend_on_the_step_alone(scheduler):
    """So that nothing but the step has to be restored."""
    flags = ("--scheduler", scheduler, "--warmup_step", 5, "--max_step", 50)
    assert make(*flags)[0].state_dict() == {}
    assert make(*flags)[0].set(30) == rates(31, *flags)[30]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_by_name(name):
    args = parse(["--optim", name, "--lr", "0.25", "--weight_decay", "0.125"])
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(args, model)
    assert type(optimizer) is getattr(torch.optim, name)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["weight_decay"] == 0.125
    plain = getattr(torch.optim, name)(model.parameters(), lr=0.25, weight_decay=0.125)
    fused = {"fused": True} if name in FUSED else {}
    assert optimizer.defaults == plain.defaults | fused


def updates(optimizer, model, n=5):
    for step in range(n):
        optimizer.zero_grad()
        model(torch.full((1, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimiser_is_the_plain_one_up_to_rounding(name):
    args = parse(["--optim", name, "--lr", "0.1", "--weight_decay", "0.01"])
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    plain = getattr(torch.optim, name)(twin.parameters(), lr=0.1, weight_decay=0.01)
    found, expected = updates(make_optimizer(args, model), model), updates(plain, twin)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_without_a_fused_form_the_plain_one_is_used(monkeypatch, error):
    class OlderAdam(torch.optim.Adam):
        def __init__(self, *args, **options):
            if "fused" in options:
                raise error("no such thing")
            super().__init__(*args, **options)

    monkeypatch.setattr(torch.optim, "Adam", OlderAdam)
    args = parse(["--optim", "Adam"])
    assert make_optimizer(args, nn.Linear(3, 2)).defaults["fused"] is None


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("saved_fused", [True, None])
def test_a_saved_state_goes_on_with_the_kernels_of_this_machine(name, saved_fused):
    args = parse(["--optim", name, "--lr", "0.1"])
    model = nn.Linear(3, 2)
    saved = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=saved_fused)
    updates(saved, model)
    state, twin = copy.deepcopy(saved.state_dict()), copy.deepcopy(model)
    optimizer = make_optimizer(args, twin)
    restore_optimizer(optimizer, state)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}  # of this run, as all options
    assert [g["fused"] for g in optimizer.param_groups] == [True]
    found, expected = updates(optimizer, twin), updates(saved, model)
    exact = {"rtol": 0, "atol": 0} if saved_fused else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("wnorm", [False, True])
def test_muon_takes_the_matrices_of_layer_and_injection(wnorm):
    model = build(wnorm=wnorm)
    optimizer = make_optimizer(parse(["--optim", "Muon"]), model)
    own = {id(p) for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    chosen = {n for n, p in model.named_parameters() if id(p) in own}
    end = "weight_v" if wnorm else "weight"
    layer = ("dec_attn.qkv_net", "dec_attn.r_net", "dec_attn.o_net", "pos_ff.ff1_net")
    layer += ("pos_ff.ff2_net",)
    assert chosen == {"inject_conv.weight", *(f"func.{name}.{end}" for name in layer)}
