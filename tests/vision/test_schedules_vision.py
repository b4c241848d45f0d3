"""Learning rates against PyTorch's schedulers, and the weight of the Jacobian loss."""

import math

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from mdeq_vision.config import config
from mdeq_vision.schedules import jac_factor, learning_rate, make_optimizer
from small_vision import build


def settings(**changes):
    cfg = config.clone()
    cfg.defrost()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        assert key in cfg[section], name
        cfg[section][key] = value
    return cfg


def reference_rates(scheduler_of, lr: float, updates: int, every: int = 1) -> list[float]:
    """The rate of each update; the scheduler is stepped after every ``every``-th."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = scheduler_of(optimizer), []
    for update in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (update + 1) % every == 0:
            scheduler.step()
    return rates


def rates(cfg, steps_per_epoch: int) -> list[float]:
    updates = cfg.TRAIN.END_EPOCH * steps_per_epoch
    return [learning_rate(cfg, step, steps_per_epoch) for step in range(updates)]


@pytest.mark.parametrize(("lr", "epochs", "per_epoch"), [(0.05, 4, 25), (0.001, 3, 7), (1.0, 1, 1)])
def test_cosine(lr, epochs, per_epoch):
    """Per update, to 1e-6 over all epochs."""
    cfg = settings(TRAIN__LR=lr, TRAIN__END_EPOCH=epochs, TRAIN__LR_SCHEDULER="cosine")
    total = epochs * per_epoch
    expected = reference_rates(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total, eta_min=1e-6), lr, total
    )
    assert rates(cfg, per_epoch) == pytest.approx(expected, rel=1e-9)
    assert learning_rate(cfg, 0, per_epoch) == lr
    assert learning_rate(cfg, total, per_epoch) == pytest.approx(1e-6, rel=1e-9)
    assert learning_rate(cfg, total + 99, per_epoch) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("milestones", [[2, 4], [30, 60], [], [1], [1, 1, 3], [0, 2]], ids=str)
@pytest.mark.parametrize("per_epoch", [1, 3])
def test_step(milestones, per_epoch):
    """Per epoch; PRETRAIN_STEPS has no part in it."""
    cfg = settings(
        TRAIN__LR=0.3,
        TRAIN__END_EPOCH=6,
        TRAIN__LR_STEP=milestones,
        TRAIN__LR_FACTOR=0.2,
        TRAIN__PRETRAIN_STEPS=2,
    )
    assert cfg.TRAIN.LR_SCHEDULER == "step"
    expected = reference_rates(
        lambda o: lr_scheduler.MultiStepLR(o, milestones, gamma=0.2), 0.3, 6 * per_epoch, per_epoch
    )
    assert rates(cfg, per_epoch) == pytest.approx(expected, rel=1e-12)


def test_poly():
    cfg = settings(TRAIN__LR=0.01, TRAIN__END_EPOCH=5, TRAIN__LR_SCHEDULER="poly")
    assert rates(cfg, 8) == [0.01 * (1 - n / 40) ** 0.9 for n in range(40)]
    assert learning_rate(cfg, 40, 8) == 0
    assert learning_rate(cfg, 50, 8) == 0  # not a complex number


# --- The Jacobian loss ------------------------------------------------------------------------

JAC = {
    "LOSS__JAC_LOSS_WEIGHT": 0.4,
    "LOSS__PRETRAIN_JAC_LOSS_WEIGHT": 0.03,
    "LOSS__JAC_INCREMENTAL": 50,
    "LOSS__JAC_STOP_EPOCH": 9,
    "TRAIN__PRETRAIN_STEPS": 120,  # no multiple of 50: growth is counted from here
}


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        (0, 0, 0.03),
        (119, 0, 0.03),
        (119, 20, 0.03),  # stacked longer than JAC_STOP_EPOCH
        (120, 0, 0.4),
        (149, 1, 0.4),
        (150, 1, 0.4),
        (169, 1, 0.4),
        (170, 1, 0.5),
        (171, 1, 0.5),
        (219, 1, 0.5),
        (220, 1, 0.6),
        (120 + 50 * 30, 8, 3.4),
        (170, 8, 0.5),
        (170, 9, 0.0),
        (10**6, 10, 0.0),
    ],
)
def test_jac_factor(step, epoch, expected):
    assert jac_factor(settings(**JAC), step, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("increment", [0, -1, 100_000_000])
def test_jac_factor_without_growth(increment):
    cfg = settings(**{**JAC, "LOSS__JAC_INCREMENTAL": increment})
    assert {jac_factor(cfg, step, 0) for step in range(120, 700)} == {0.4}


def test_jac_factor_without_pretraining():
    cfg = settings(**{**JAC, "TRAIN__PRETRAIN_STEPS": 0})
    found = [jac_factor(cfg, step, 0) for step in (0, 49, 50, 99, 100)]
    assert found == pytest.approx([0.4, 0.4, 0.5, 0.5, 0.6])


def test_jac_factor_grows_from_nothing():
    """A weight of 0 that grows is one of 0.1 after the first interval, as the formula says."""
    cfg = settings(**{**JAC, "LOSS__JAC_LOSS_WEIGHT": 0.0})
    assert [jac_factor(cfg, step, 0) for step in (120, 169, 170)] == [0.0, 0.0, 0.1]


# --- Optimisers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8}),
    ],
)
def test_optimizers(name, kind, options):
    cfg = settings(
        TRAIN__OPTIMIZER=name,
        TRAIN__LR=0.02,
        TRAIN__WD=0.003,
        TRAIN__MOMENTUM=0.8,
        TRAIN__NESTEROV=True,
    )
    torch.manual_seed(0)
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    own = make_optimizer(cfg, one)
    assert type(own) is kind
    other = kind(two.parameters(), lr=0.02, weight_decay=0.003, **options)
    for _ in range(3):
        for model, optimizer in ((one, own), (two, other)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("kind", ["cls", "seg"])
def test_muon_takes_the_kernels(kind):
    """Of stem, layer and head; the start, the last layer, norms and classifier learn by AdamW."""
    model = build(kind, MODEL__WNORM=True, DEQ__F_START="learned")
    optimizer = make_optimizer(settings(TRAIN__OPTIMIZER="muon"), model)
    own = {id(p) for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    found = {name for name, p in model.named_parameters() if id(p) in own}
    left_out = ("start.", "last_layer.", "classifier.")
    convolutions = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and not name.startswith(left_out)
    }
    ends = {f"{name}.weight" for name in convolutions} | {f"{n}.weight_v" for n in convolutions}
    assert found == ends & {name for name, _ in model.named_parameters()}
    assert len(found) == len(convolutions) > 8
    assert any(name.startswith("fullstage.") and name.endswith("weight_v") for name in found)


def test_nesterov_is_of_sgd_alone():
    cfg = settings(TRAIN__OPTIMIZER="sgd", TRAIN__NESTEROV=False)
    assert make_optimizer(cfg, torch.nn.Linear(1, 1)).defaults["nesterov"] is False
    assert math.isclose(make_optimizer(cfg, torch.nn.Linear(1, 1)).defaults["lr"], 0.001)


# ---- fused optimisers ----------------------------------------------------------------------------


def updates(optimizer, parameters, number):
    generator = torch.Generator().manual_seed(3)
    for _ in range(number):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_fused(name):
    """On the CPU too, and the same to rounding as a loop over the parameters."""
    cfg = settings(TRAIN__OPTIMIZER=name, TRAIN__WD=0.1, TRAIN__NESTEROV=True)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(cfg, model) for model in models]
    assert all(group["fused"] for o in optimizers for group in o.param_groups)
    optimizers[1].param_groups[0]["fused"] = None
    for optimizer, model in zip(optimizers, models, strict=True):
        updates(optimizer, list(model.parameters()), 3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
