"""Every solver and every gradient by name, through the image tools: four steps at equilibrium."""

import math
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass
from itertools import product

import pytest
import run_progress
import yaml

import small_digits
from gradient_names import (
    BACKWARD,
    COMBINATIONS,
    FORWARD,
    GRADS,
    REFUSED,
    SAME,
    SOLVES_BACK,
    check_steps,
    refusal,
)
from harness import assert_same_run
from lib.gradients import GRADIENTS
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, read_metrics
from mdeq_vision.command import CONFIG, load_config
from mdeq_vision.image_trainer import ImageTrainer
from mdeq_vision.model import get_cls_net
from mdeq_vision.quickstart import main as quickstart
from parameters import slow_but
from small_digits import SMALL
from small_runs import DIGITS, ROOM, SCENES, TINY_DIGITS, TINY_SCENES, run_tool

quick = small_digits.quick  # fixture
# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")

# Two stacked steps, then four at equilibrium; validated at the border and at the end of an epoch.
SIX = """
    TRAIN.PRETRAIN_STEPS 2 LOSS.JAC_LOSS_FREQ 0 MODEL.DROPOUT 0 TEST.NUM_SAMPLES 4
    DEQ.F_THRES 5 DEQ.B_THRES 5
""".split()
KINDS = {
    "cls": (
        "digits",
        DIGITS,
        [*TINY_DIGITS, *SMALL, *SIX, "PERCENT", 0.0191, "TRAIN.END_EPOCH", 1],
    ),
    "seg": ("digit_scenes", SCENES, [*TINY_SCENES, *SMALL, *SIX, "PERCENT", 0.3]),
}
SPELLING = "DEQ.{}"
FORWARD = [*FORWARD, "newton_krylov:inner=4"]
# What a step of Newton takes: 20 products, or 4, and what is tried in vain. 5 for the others.
F_THRES = {"newton_krylov": 30, "newton_krylov:inner=4": 16}
DROPOUT = "MODEL.DROPOUT 0.1 LOSS.JAC_LOSS_FREQ 1 LOSS.JAC_LOSS_WEIGHT 1"


@dataclass
class Trained:
    """A run: its training records, its log, and the gradients that each step was given."""

    steps: list[dict]
    log: str
    reached: list[set[str]]  # names of the parameters with a gradient other than zero

    @property
    def losses(self):
        return [r["loss"] for r in self.steps]


class Place:
    """Where runs of both kinds lie."""

    def __init__(self, parent):
        self.parent = parent

    def argv(self, kind, *more, to="run", cfg=None):
        _, file, settings = KINDS[kind]
        places = ["--cfg", cfg or file, "--modelDir", self.parent / to]
        return [str(a) for a in (*places, *settings, *more)]

    def folder(self, kind, to="run", cfg=None):
        dataset, file, _ = KINDS[kind]
        return self.parent / to / dataset / (cfg or file).stem


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def run(place, monkeypatch):
    """Train a model of a kind with overrides: ``run(kind, *overrides)``."""
    reached, real = [], ImageTrainer.set_learning_rate

    def note(trainer):  # after backward, before the update
        named = [(n, p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None]
        assert all(g.isfinite().all() for _, g in named)
        reached.append({name for name, g in named if g.any()})
        real(trainer)

    monkeypatch.setattr(ImageTrainer, "set_learning_rate", note)

    def go(kind, *more, to="run", cfg=None):
        reached.clear()
        assert run_tool(f"{kind}_train", *place.argv(kind, *more, to=to, cfg=cfg)) == 0
        folder = place.folder(kind, to, cfg)
        steps = [r for r in read_metrics(folder) if r["kind"] == "train"]
        return Trained(steps, (folder / LOG).read_text(), list(reached))

    return go


def check(found, grad="ift", f_thres=5):
    """All that has to hold of the steps with that gradient."""
    check_steps(found.steps, found.log, grad, SPELLING, f_thres)
    solved = found.steps[2:]
    most = 10 if grad.startswith("unroll") else 1.01  # its last state need not be its best
    assert all(r["forward_rel_residual"] < most for r in solved)  # z = 0 has 1
    assert all(r.get("backward_nfe", 0) <= 6 for r in solved)
    assert all(r.get("backward_rel_residual", 0) < 1.01 for r in solved)

    # From the equilibrium, gradients reach all that they reach by plain autograd; unless so few
    # iterations find no adjoint that is better than zero.
    stacked = found.reached[1]
    assert any(name.startswith("downsample.") for name in stacked)  # the stem
    assert any(name.startswith("fullstage.") for name in stacked)
    counted = [r.get("backward_rel_residual", 0) < 0.99 for r in solved]
    assert any(counted)
    for reached in (names for names, c in zip(found.reached[2:], counted, strict=True) if c):
        assert sorted(stacked - reached) == []


# ---- six steps ----------------------------------------------------------------------------------


def of_kinds(names, cls, seg):
    """(kind, name): those of ``cls`` for classification and of ``seg`` for segmentation.

    The rest are slow: lib reads the names, and its own tests take them all.
    """
    chosen = [*product(["cls"], cls), *product(["seg"], seg)]
    return slow_but(chosen, product(["cls", "seg"], names))


@pytest.mark.parametrize(
    ("kind", "solver"),
    of_kinds(
        FORWARD,
        ["anderson", "broyden:stop=sample", "fixed_point_iteration:damping=0.5"],
        ["newton_krylov:inner=4"],
    ),
)
def test_forward_solver(run, kind, solver):
    f_thres = F_THRES.get(solver, 5)
    check(run(kind, "DEQ.F_SOLVER", solver, "DEQ.F_THRES", f_thres), f_thres=f_thres)


@pytest.mark.parametrize(
    ("kind", "solver"), of_kinds(BACKWARD, ["anderson", "bicgstab"], ["gmres"])
)
def test_backward_solver(run, kind, solver):
    check(run(kind, "DEQ.B_SOLVER", solver))


@pytest.mark.parametrize(
    ("kind", "grad"),
    of_kinds(
        GRADS,
        ["ift", "jfb", "shine:refine=2", "unroll:checkpointing=true"],
        ["reversible", "shine", "unroll"],
    ),
)
def test_gradient(run, kind, grad):
    found = run(kind, "DEQ.GRAD", grad)
    check(found, grad)
    if grad.startswith(("reversible", "unroll")):
        nfe = 4 if grad == "reversible" else 5  # whole coupled steps
        assert {r.get("forward_nfe") for r in found.steps} == {None, nfe}


@pytest.mark.parametrize(
    ("kind", "grad"),
    of_kinds(
        ["shine", "phantom", "reversible", "unroll"], ["shine", "reversible", "unroll"], ["phantom"]
    ),
)
def test_with_dropout_and_the_jacobian_loss(run, kind, grad):
    found = run(kind, "DEQ.GRAD", grad, *DROPOUT.split(), "DEQ.RAND_F_THRES_DELTA", 2)
    check(found, grad, f_thres=6)  # it varies up to one more
    assert all(r["jac_loss"] > 0 for r in found.steps[2:])


@pytest.mark.parametrize(
    ("kind", "grad"), of_kinds(GRADS, ["ift", "phantom", "reversible", "unroll"], ["shine"])
)
def test_bfloat16(run, kind, grad):
    epoch = ["PERCENT", "0.016"] if kind == "cls" else ["PERCENT", "0.5", "TRAIN.END_EPOCH", 1]
    found = run(kind, "DEQ.GRAD", grad, "AMP", "bf16", *epoch)
    assert len(found.steps) == 5
    assert all(math.isfinite(loss) for loss in found.losses)
    assert ["backward_nfe" in r for r in found.steps] == [False] * 2 + [grad in SOLVES_BACK] * 3


MORE = [DROPOUT, "", "AMP bf16 TRAIN.BATCH_CHUNK 2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("f_solver", "b_solver", "grad", "more"),
    [(*names, MORE[(i + i // 6) % 3]) for i, names in enumerate(COMBINATIONS)],  # each with each
)
def test_combination(run, f_solver, b_solver, grad, more):
    names = ["DEQ.F_SOLVER", f_solver, "DEQ.B_SOLVER", b_solver, "DEQ.GRAD", grad]
    found = run("cls", *names, *more.split())
    assert all(math.isfinite(loss) for loss in found.losses)
    assert ["backward_nfe" in r for r in found.steps] == [False] * 2 + [grad in SOLVES_BACK] * 4


@pytest.mark.parametrize(("grad", "same"), slow_but(SAME[:1], SAME))
def test_same_by_another_name(run, grad, same):
    """Bit for bit, with dropout and the Jacobian loss."""
    found = run("cls", "DEQ.GRAD", grad, *DROPOUT.split())
    again = run("cls", "DEQ.GRAD", same, *DROPOUT.split(), to="same")
    assert found.losses == again.losses


# ---- settings -----------------------------------------------------------------------------------


def test_names_with_options_in_a_yaml_file(run, place, tmp_path):
    settings, cfg = yaml.safe_load(DIGITS.read_text()), tmp_path / "own.yaml"
    names = {
        "F_SOLVER": "broyden:memory=4",
        "B_SOLVER": "gmres:restart=4",
        "GRAD": "shine:refine=2",
    }
    settings["DEQ"] |= names
    cfg.write_text(yaml.safe_dump(settings))
    found = run("cls", cfg=cfg)
    check(found, "shine:refine=2")
    saved = load_config(Namespace(cfg=place.folder("cls", cfg=cfg) / CONFIG)).DEQ
    assert {name: saved[name] for name in names} == names


@pytest.mark.parametrize("kind", slow_but(["seg"], KINDS))
def test_options_and_the_summary_of_the_model(run, kind):
    """Which builds the model a second time, on the meta device."""
    found = run(kind, "DEQ.F_SOLVER", "anderson:m=3", "DEQ.B_SOLVER", "gmres:restart=4")
    check(found)
    assert "Total params" in found.log


# ---- learning, going on, evaluation -------------------------------------------------------------

ONE_BATCH = """
    PERCENT 0.003 TRAIN.BATCH_SIZE_PER_GPU 8 TRAIN.SHUFFLE False DATASET.AUGMENT False
    TRAIN.PRETRAIN_STEPS 0 TRAIN.END_EPOCH 10 TEST.NUM_SAMPLES 2 TRAIN.LR 0.02
""".split()


@pytest.mark.parametrize(
    "grad",
    slow_but(["ift", "reversible"], GRADIENTS),
)
def test_it_learns(run, grad):
    """Eight images by heart, at equilibrium from the first step on."""
    losses = run("cls", "DEQ.GRAD", grad, *ONE_BATCH).losses
    assert len(losses) == 10
    assert max(losses[-3:]) < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("kind", "grad"),
    slow_but([("cls", "phantom")], product(KINDS, GRADS)),
)
def test_resumed_at_equilibrium(place, stop_at, kind, grad):
    """Saved after step 4, stopped after step 5: bit for bit the run that was not."""
    more = ["DEQ.GRAD", grad, *DROPOUT.split(), "LOSS.JAC_LOSS_FREQ", 0.5]
    more += ["DEQ.RAND_F_THRES_DELTA", 2, "SAVE_FREQ", 4]
    tool = f"{kind}_train"
    assert run_tool(tool, *place.argv(kind, *more, to="whole")) == 0
    stop_at(5)
    assert run_tool(tool, *place.argv(kind, *more)) == 130
    assert load(place.folder(kind) / CHECKPOINT)["step"] == 4
    assert run_tool(tool, *place.argv(kind, *more, "TRAIN.RESUME", True)) == 0
    assert_same_run(place.folder(kind), place.folder(kind, "whole"))


@pytest.mark.parametrize("kind", slow_but(["cls"], KINDS))  # one layer, whatever its head
def test_evaluation_with_other_gradients(run, place, capsys, kind):
    """Those that follow a solver leave evaluation to it; the others evaluate f to the threshold."""
    run(kind, "DEQ.GRAD", "phantom")
    tool, lines = {"cls": "cls_valid", "seg": "seg_test"}[kind], {}
    for grad in ("phantom", "shine", "unroll", "reversible"):
        capsys.readouterr()
        assert run_tool(tool, *place.argv(kind, "DEQ.GRAD", grad, "DEBUG.DEBUG", True)) == 0
        (lines[grad],) = [x for x in capsys.readouterr().out.splitlines() if " | f res " in x]
    assert lines["phantom"] == lines["shine"] != lines["unroll"]
    assert "nfe 5.0" in lines["unroll"]
    assert "nfe 4.0" in lines["reversible"]


# ---- reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "grad"),
    slow_but(
        [("digits", "jfb")],
        product(("digits", "scenes"), [g for g in GRADS if g not in SOLVES_BACK]),
    ),
)
def test_quickstart_reports_forward_solves_alone(tmp_path, task, grad):
    shutil.copytree(ROOM / "experiments", tmp_path / "experiments")
    dataset, file, settings = KINDS[{"digits": "cls", "scenes": "seg"}[task]]
    few = {"digits": ["PERCENT", 0.016], "scenes": ["TRAIN.END_EPOCH", 1]}[task]
    argv = [task, *settings, *few, "DEQ.GRAD", grad]
    assert quickstart([str(a) for a in argv], tmp_path) == 0
    folder = tmp_path / "output" / dataset / file.stem
    text = (folder / "report.txt").read_text()
    assert "nan" not in text.lower()
    assert "backward" not in text
    table = {line[0]: line[1:] for line in (re.split("  +", x) for x in text.splitlines())}
    solved = [r for r in read_metrics(folder) if "forward_nfe" in r]
    residual, nfe = map(float, table["forward, training mean"])
    mean = sum(r["forward_rel_residual"] for r in solved) / len(solved)
    assert residual == pytest.approx(mean, rel=0.01)
    assert nfe == pytest.approx(sum(r["forward_nfe"] for r in solved) / len(solved), abs=0.05)
    assert float(table["forward, evaluation mean"][1]) > 0
    assert (folder / "curves.png").stat().st_size > 10_000


def test_progress_of_a_run(run, place, capsys):
    more = ["DEQ.GRAD", "phantom:steps=2,damping=0.8", "DEQ.F_SOLVER", "anderson:m=3"]
    run("cls", *more)
    capsys.readouterr()
    assert run_progress.main(["tools/cls_train.py", *place.argv("cls", *more)]) == 0
    assert capsys.readouterr().out == "finished 6\n"


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "settings"),
    [
        *product(["cls_train"], REFUSED),
        *product(["seg_train", "cls_valid", "seg_test"], REFUSED[::6]),
    ],
)
def test_what_is_refused(place, tmp_path, capsys, recwarn, tool, settings):
    argv, parts = refusal(settings, SPELLING)
    assert run_tool(tool, *place.argv(tool[:3], *argv)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{tool}.py: ")
    assert [part for part in parts if part not in line] == []
    assert captured.out == ""
    assert len(recwarn) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damping", [0.5, 0.8, 0.95])
def test_the_threshold_that_a_refusal_names_works(place, capsys, damping):
    more = ["DEQ.GRAD", f"reversible:damping={damping}", "DEQ.F_THRES"]
    assert run_tool("cls_train", *place.argv("cls", *more, 99)) == 2
    (most,) = re.findall(r"lower DEQ.F_THRES to (\d+)", capsys.readouterr().err)
    cfg = load_config(Namespace(cfg=DIGITS, opts=[*more, most]))
    assert get_cls_net(cfg).f_thres == int(most)
