"""Steps of the trainer against the formulas written out, and when a step is regularised."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lib.runs.processes import Processes
from mdeq_vision.losses import SegmentationLoss, mean_loss
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer
from small_vision import build, images, tiny_config

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
CPU = torch.device("cpu")

# ---- a step, by hand ----------------------------------------------------------------------------


class Scenes(TensorDataset):
    """Stands for a segmentation data set, with images of one size."""

    has_labels = True

    def check_batches(self, cfg):
        pass

    class facts:
        class_weights = (0.5, 2.0, 1.0, 3.0)


def trainer_of(kind, **changes):
    """A trainer on twelve random images in batches of four, in float64; and the batches."""
    settings = {
        "DROPOUT": 0.2,
        "WNORM": True,
        "LOSS__JAC_LOSS_FREQ": 1.0,
        "LOSS__JAC_LOSS_WEIGHT": 1.5,
        "LOSS__PRETRAIN_JAC_LOSS_WEIGHT": 0.7,
        "DEQ__F_THRES": 12,
        "DEQ__B_THRES": 12,
        "DEQ__RAND_F_THRES_DELTA": 0,
        "TRAIN__BATCH_SIZE_PER_GPU": 4,
        "TRAIN__END_EPOCH": 100,
        "TRAIN__IGNORE_LABEL": 255,
        **changes,
    }
    cfg, model = tiny_config(**settings), build(kind, **settings)
    cfg.WORKERS = 0
    x = images(8, 8, batch=12)
    generator = torch.Generator().manual_seed(5)
    if kind == "cls":
        data = TensorDataset(x, torch.randint(5, (12,), generator=generator))
        cls = ClassificationTrainer
    else:
        label = torch.randint(4, (12, 16, 16), generator=generator)
        label[:, :5] = 255
        data, cls = Scenes(x, label), SegmentationTrainer
    trainer = cls(cfg, model, data, data, CPU, [], Processes())
    trainer.model.train()
    return trainer, [data[4 * i : 4 * i + 4] for i in range(3)]


def loss_by_hand(kind, cfg, output, target):
    if kind == "cls":
        return F.cross_entropy(output, target)
    size = target.shape[1:]
    logits = F.interpolate(output, size, mode="bilinear", align_corners=True)
    weights = torch.tensor(Scenes.facts.class_weights, dtype=logits.dtype)
    return F.cross_entropy(logits, target, weights, ignore_index=255)


def update_by_hand(cfg, parameters, memory, lr):
    """One update of the optimiser; ``memory`` is a dictionary per parameter, empty at first."""
    train = cfg.TRAIN
    for p, m in zip(parameters, memory, strict=True):
        g = p.grad + train.WD * p
        if train.OPTIMIZER == "adam":
            t = m["t"] = m.get("t", 0) + 1
            m["m"] = 0.9 * m.get("m", 0) + 0.1 * g
            m["v"] = 0.999 * m.get("v", 0) + 0.001 * g**2
            step = (m["m"] / (1 - 0.9**t)) / ((m["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
        elif train.OPTIMIZER == "sgd":
            m["b"] = train.MOMENTUM * m["b"] + g if "b" in m else g
            step = g + train.MOMENTUM * m["b"] if train.NESTEROV else m["b"]
        else:
            m["v"] = 0.99 * m.get("v", 0) + 0.01 * g**2
            step = m["b"] = train.MOMENTUM * m.get("b", 0) + g / (m["v"].sqrt() + 1e-8)
        p -= lr * step


@pytest.mark.parametrize("kind", ["cls", "seg"])
@pytest.mark.parametrize("phase", ["stacked", "equilibrium"])
@pytest.mark.parametrize(
    "changes",
    [
        {"TRAIN__OPTIMIZER": "adam", "TRAIN__WD": 0.01},
        {"TRAIN__OPTIMIZER": "sgd", "TRAIN__NESTEROV": True, "TRAIN__CLIP": 0.3},
        {"TRAIN__OPTIMIZER": "rmsprop", "TRAIN__MOMENTUM": 0.5, "LOSS__JAC_LOSS_FREQ": 0.0},
    ],
    ids=lambda changes: changes["TRAIN__OPTIMIZER"],
)
def test_steps_by_hand(kind, phase, changes):
    """Loss, Jacobian factor, clipping, optimiser: as the formulas say, with the same draws."""
    border = 100 if phase == "stacked" else 0
    changes = {"TRAIN__LR_SCHEDULER": "poly", "TRAIN__PRETRAIN_STEPS": border, **changes}
    trainer, batches = trainer_of(kind, **changes)
    cfg, model = trainer.cfg, copy.deepcopy(trainer.model)
    parameters = list(model.parameters())
    memory = [{} for _ in parameters]
    factor = cfg.LOSS.PRETRAIN_JAC_LOSS_WEIGHT if border else cfg.LOSS.JAC_LOSS_WEIGHT
    factor *= cfg.LOSS.JAC_LOSS_FREQ
    total = 0.0
    for step, (x, target) in enumerate(batches):
        torch.manual_seed(step)
        trainer.update((x, target))

        torch.manual_seed(step)  # the same masks and the same vectors
        output, jac_loss, _ = model(
            x, train_step=step, compute_jac_loss=factor > 0, f_thres=12, b_thres=12
        )
        loss = loss_by_hand(kind, cfg, output, target)
        total += loss.item()
        assert (jac_loss.item() > 0) == (factor > 0)
        model.zero_grad()
        (loss + factor * jac_loss.sum()).backward()
        grads = [p.grad for p in parameters]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        if cfg.TRAIN.CLIP > 0:
            assert norm > cfg.TRAIN.CLIP, "nothing to clip"
            for g in grads:
                g.mul_(cfg.TRAIN.CLIP / (norm + 1e-6))
        with torch.no_grad():
            update_by_hand(cfg, parameters, memory, cfg.TRAIN.LR * (1 - step / 300) ** 0.9)
    assert trainer._window["loss"] == pytest.approx(total, rel=1e-10)
    found = trainer.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_ohem_is_the_criterion_of_the_settings():
    trainer, batches = trainer_of(
        "seg", LOSS__USE_OHEM=True, LOSS__OHEMTHRES=0.3, LOSS__OHEMKEEP=50, TRAIN__PRETRAIN_STEPS=9
    )
    _, target = batches[0]
    output = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    criterion = SegmentationLoss(
        class_weights=Scenes.facts.class_weights, ohem=True, ohem_thres=0.3, ohem_keep=50
    )
    assert mean_loss(*trainer.loss(output, target)) == mean_loss(*criterion(output, target))
    assert mean_loss(*trainer.loss(output, target)) > F.cross_entropy(
        F.interpolate(output, (16, 16), mode="bilinear", align_corners=True),
        target,
        ignore_index=255,
    )


# ---- when a step is regularised -----------------------------------------------------------------


def spied(trainer, steps):
    """The options of ``steps`` calls of the model; it answers without computing."""
    calls = []

    def forward(x, **options):
        calls.append(options)
        zero = sum(p.sum() * 0 for p in trainer.model.parameters())
        return zero + torch.zeros(len(x), 5, dtype=x.dtype), zero.view(1, 1), zero

    trainer.parallel = forward
    x, target = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    for _ in range(steps):
        trainer.position = 0  # this batch is not of its data set
        trainer.update((x, target))
    return calls


@pytest.mark.parametrize("border", [0, pytest.param(1000, marks=pytest.mark.slow)])
def test_f_thres_varies_in_regularised_steps_alone(border):
    trainer, _ = trainer_of(
        "cls",
        LOSS__JAC_LOSS_FREQ=0.4,
        DEQ__F_THRES=20,
        DEQ__RAND_F_THRES_DELTA=3,
        TRAIN__PRETRAIN_STEPS=border,
    )
    assert [c["train_step"] for c in spied(trainer, 3)] == [0, 1, 2]
    choices = [trainer.draw() for _ in range(400)]
    regular = [c.f_thres for c in choices if c.jac_weight is not None]
    assert {c.f_thres for c in choices if c.jac_weight is None} == {20}
    assert set(regular) == {17, 18, 19, 20, 21}
    counts = [regular.count(value) for value in range(17, 22)]
    assert min(counts) > 0.5 * max(counts)  # uniform: each about 32 of 160
    assert len(regular) == pytest.approx(160, abs=40)  # four standard deviations


def test_f_thres_stays_positive():
    trainer, _ = trainer_of("cls", DEQ__F_THRES=2, DEQ__RAND_F_THRES_DELTA=9)
    assert {trainer.draw().f_thres for _ in range(100)} == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "regularised"),
    [
        ({"LOSS__JAC_LOSS_FREQ": 0.0}, [False] * 12),
        ({}, [True] * 12),
        ({"LOSS__PRETRAIN_JAC_LOSS_WEIGHT": 0.0}, [False] * 4 + [True] * 8),
        ({"LOSS__JAC_STOP_EPOCH": 2}, [True] * 6 + [False] * 6),  # epochs of three steps
        ({"LOSS__JAC_STOP_EPOCH": 1}, [True] * 4 + [False] * 8),  # not of the stacked phase
        ({"LOSS__JAC_LOSS_WEIGHT": 0.0}, [True] * 4 + [False] * 8),
    ],
)
def test_which_steps_are_regularised(changes, regularised):
    trainer, _ = trainer_of("cls", TRAIN__PRETRAIN_STEPS=4, **changes)
    found = []
    for epoch in range(4):
        trainer.epoch = epoch
        found += [c["compute_jac_loss"] for c in spied(trainer, 3)]
    assert found == regularised


def test_the_draws_do_not_depend_on_the_phase():
    a, b = (
        spied(trainer_of("cls", LOSS__JAC_LOSS_FREQ=0.5, TRAIN__PRETRAIN_STEPS=steps)[0], 30)
        for steps in (0, 15)
    )
    assert [c["compute_jac_loss"] for c in a] == [c["compute_jac_loss"] for c in b]
