"""Segmentation in two processes on the CPU (gloo) against one process with the doubled batch.

Two processes run this file as a script and go through all cases of a few steps.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from cases import the_same_vectors
from groups import run_group, work
from lib.runs.processes import Processes
from mdeq_vision.evaluation import evaluate_segmentation
from mdeq_vision.tasks import SegmentationTrainer
from small_vision import EQUILIBRIUM, STACKED, build, freeze_batch_norm, images, tiny_config

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
EACH, SIDE, STEPS, N_CLASSES = 2, 12, 3, 4  # samples of a process; side of an image
TOLERANCE = 1e-5
WEIGHTS_OF_CLASSES = (0.5, 2.0, 1.0, 3.0)

# Name -> changes of the settings, class weights, share of ignored pixels of each process.
UNEVEN = (0.8, 0.1)
CASES = {
    "class weights": ({}, WEIGHTS_OF_CLASSES, UNEVEN),
    "equal weights": ({"WNORM": True}, None, UNEVEN),
    "one process without a label": ({}, WEIGHTS_OF_CLASSES, (1.0, 0.3)),
    "no label at all": ({}, WEIGHTS_OF_CLASSES, (1.0, 1.0)),
    # The threshold is the given one, so that it does not depend on the process.
    "OHEM": (
        {"LOSS__USE_OHEM": True, "LOSS__OHEMKEEP": 0, "LOSS__OHEMTHRES": 0.4},
        WEIGHTS_OF_CLASSES,
        UNEVEN,
    ),
    "Jacobian loss": (
        {"LOSS__JAC_LOSS_FREQ": 1.0, "LOSS__JAC_LOSS_WEIGHT": 2.0},
        WEIGHTS_OF_CLASSES,
        UNEVEN,
    ),
    "clipped": ({"TRAIN__CLIP": 0.01}, WEIGHTS_OF_CLASSES, UNEVEN),
    "four branches": ({"branches": 4, "DOWNSAMPLE_TIMES": 1}, WEIGHTS_OF_CLASSES, UNEVEN),
}
SETTINGS = {
    "DATASET__NUM_CLASSES": N_CLASSES,
    "DEQ__B_THRES": 400,
    "DEQ__F_THRES": 400,
    "DEQ__RAND_F_THRES_DELTA": 0,
    "LOSS__PRETRAIN_JAC_LOSS_WEIGHT": 1.0,
    "TEST__BASE_SIZE": SIDE,
    "TRAIN__IGNORE_LABEL": 255,
    "TRAIN__LR": 0.05,
    "TRAIN__OPTIMIZER": "sgd",
}
# scale/test_same_losses.py trains scenes with the Jacobian loss.
QUICK = ("class weights", "one process without a label")
REST = tuple(case for case in CASES if case not in QUICK)
PHASES = {"stacked": STACKED, "equilibrium": EQUILIBRIUM}
NORMS = ("synchronised", "eval")


class Data:
    """Stands for a data set of five images of one size; the last batch is not full."""

    has_labels = True

    def __init__(self, class_weights):
        self.facts = SimpleNamespace(class_weights=class_weights)
        self.images, labels = batch(0, (0.2,), 5)
        self.labels = labels[:, :SIDE, :SIDE]

    def check_batches(self, cfg):
        pass

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def batch(step, ignored, n):
    """Images (n, 3, SIDE, SIDE) and labels at twice that; n / len(ignored) of each share."""
    generator = torch.Generator().manual_seed(10 + step)
    shape = (n, 2 * SIDE, 2 * SIDE)
    label = torch.randint(N_CLASSES, shape, generator=generator)
    shares = torch.tensor(ignored).repeat_interleave(n // len(ignored)).view(n, 1, 1)
    label[torch.rand(shape, generator=generator) < shares] = 255
    return images(SIDE, SIDE, batch=n, seed=step), label


def make_trainer(case, phase, norm, processes):
    changes, class_weights, _ = CASES[case]
    settings = {**SETTINGS, **changes}
    settings["TRAIN__PRETRAIN_STEPS"] = 100 if phase == "stacked" else 0
    settings["TRAIN__BATCH_SIZE_PER_GPU"] = 2 * EACH // processes.world_size
    branches = settings.pop("branches", 2)
    cfg, model = tiny_config(branches, **settings), build("seg", branches, **settings)
    cfg.WORKERS = 0
    data = Data(class_weights)
    trainer = SegmentationTrainer(cfg, model, data, data, torch.device("cpu"), [], processes)
    trainer.model.train()
    if norm == "eval":
        freeze_batch_norm(trainer.model)
    return trainer


def steps(case, phase, norm, processes):
    """Loss and gradients of a first step, and what some steps have made of the model."""
    trainer = make_trainer(case, phase, norm, processes)
    mine = slice(0, 2 * EACH)
    if processes.world_size > 1:
        mine = slice(EACH * processes.rank, EACH * (processes.rank + 1))
    found = {"losses": []}
    for step in range(STEPS if phase == "stacked" else 2):
        image, label = batch(step, CASES[case][2], 2 * EACH)
        trainer.position = 0  # these batches are not of its data set
        trainer.update((image[mine], label[mine]))
        found["losses"].append(trainer._window["loss"])
        if step == 0:
            found["grads"] = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    found["state"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    found["hits"] = trainer._window["hits"]
    return found


def evaluation(processes):
    """The confusion matrix, loss and indices of five images, two to a batch of a process."""
    trainer = make_trainer("class weights", "stacked", "eval", processes)
    cfg = trainer.cfg
    cfg.TEST.BATCH_SIZE_PER_GPU = 2 if processes.world_size == 1 else 1
    seen = []
    found = evaluate_segmentation(
        cfg,
        trainer.model,
        trainer.valid_set,
        train_step=0,
        device=torch.device("cpu"),
        processes=processes,
        on_prediction=lambda index, _: seen.append(index),
    )
    return {"matrix": found.confusion.matrix, "figures": found.figures, "seen": seen}


def all_cases(processes, cases):
    with the_same_vectors():
        return {
            (case, phase, norm): steps(case, phase, norm, processes)
            for case in cases
            for phase in PHASES
            for norm in NORMS
        }


# ---- what a process does ------------------------------------------------------------------------


def found_by(processes: Processes, *cases: str) -> dict:
    return {"steps": all_cases(processes, cases), "evaluation": evaluation(processes)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, server):
    """What two processes found in a group of cases, and what one process found."""
    made = {}

    def get(cases):
        if cases not in made:
            folder = tmp_path_factory.mktemp("two")
            two = run_group(__file__, 2, folder / "found", *cases, server=server, timeout=300)
            made[cases] = two, all_cases(Processes(), cases)
        return made[cases]

    return get


def largest(found, expected):
    """Largest difference of losses, gradients (to the largest gradient) and state."""
    scale = max(g.abs().max().item() for g in expected["grads"].values()) or 1.0
    return {
        "loss": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "gradient": max(
            (found["grads"][n] - g).abs().max().item() / scale for n, g in expected["grads"].items()
        ),
        "state": max(
            (found["state"][n] - v).abs().max().item() for n, v in expected["state"].items()
        ),
    }


# ---- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)]
)
def test_two_processes_are_one_with_the_doubled_batch(measured, case, phase, norm):
    both, alone = measured(QUICK if case in QUICK else REST)
    expected = alone[case, phase, norm]
    for found in both:
        found = found["steps"][case, phase, norm]
        assert found["grads"].keys() == expected["grads"].keys()
        assert all(value < TOLERANCE for value in largest(found, expected).values())
        assert found["hits"] == expected["hits"]
    none = case == "no label at all"
    assert (max(expected["losses"]) == 0) == none
    # Every parameter takes part, and the running statistics move in training only.
    still = [n for n, g in expected["grads"].items() if not g.any()]
    assert (len(still) == len(expected["grads"])) == none
    before = build("seg", CASES[case][0].get("branches", 2)).state_dict()
    name = "downsample.1.running_mean"
    assert torch.equal(expected["state"][name], before[name]) == (norm == "eval")


def test_both_processes_hold_the_same_bits(measured):
    both, _ = measured(QUICK)
    a, b = (found["steps"] for found in both)
    for key, found in a.items():
        for part in ("grads", "state"):
            assert [n for n, t in found[part].items() if not torch.equal(t, b[key][part][n])] == []


def test_every_image_is_evaluated_once(measured):
    both, _ = measured(QUICK)
    expected = evaluation(Processes())
    assert sorted(both[0]["evaluation"]["seen"] + both[1]["evaluation"]["seen"]) == [0, 1, 2, 3, 4]
    assert both[0]["evaluation"]["seen"] != []
    for found in both:
        found = found["evaluation"]
        assert torch.equal(found["matrix"], expected["matrix"])
        assert found["matrix"].sum() == (Data(None).labels != 255).sum()
        assert found["figures"]["mIoU"] == expected["figures"]["mIoU"]
        assert found["figures"]["loss"] == pytest.approx(expected["figures"]["loss"], abs=1e-12)


if __name__ == "__main__":
    work(found_by, sys.argv[1:])
