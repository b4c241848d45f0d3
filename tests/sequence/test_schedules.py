"""The learning rate of every update, and the optimisers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from deq_sequence.options import parse
from deq_sequence.schedules import LearningRate, make_optimizer

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


def test_dev_perf_state_round_trip():
    flags = ("--scheduler", "dev_perf", "--patience", 1)
    one, optimizer = make(*flags)
    for loss in (1, 2):
        one.after_evaluation(loss, 1)
    two, other = make(*flags)
    two.load_state_dict(one.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for schedule in (one, two):
        schedule.after_evaluation(2, 2)
        assert schedule.set(2) == pytest.approx(LR / 2)


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
    assert optimizer.defaults == plain.defaults


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_first_update_is_taken_at_the_warm_up_rate(name):
    """Not at the full one: then it would be ten times as large."""
    moved = []
    for warm_up in (0, 10):
        torch.manual_seed(0)
        args = parse(["--optim", name, "--lr", "0.1", "--warmup_step", str(warm_up)])
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(args, model)
        before = model.weight.detach().clone()
        model(torch.ones(1, 3)).sum().backward()
        LearningRate(args, optimizer).set(0)
        optimizer.step()
        moved.append((model.weight - before).norm().item())
    assert moved[1] == pytest.approx(moved[0] / 10, rel=1e-4)
