"""Every solver and every gradient by name, through train_transformer.py: four steps at equilibrium.

Where solves converge, all exact gradients are one: with a descent that does not divide by the size
of a gradient, steps have the same losses whatever finds the equilibrium and its adjoint.
"""

import math
import re
from dataclasses import dataclass
from itertools import product

import pytest
import run_progress
import torch

from deq_sequence import quickstart
from deq_sequence.command import main
from deq_sequence.options import parse
from deq_sequence.text_trainer import LMTrainer
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
from lib.gradients import GRADIENTS
from lib.runs.checkpoint import load
from lib.runs.figures import draw_curves, solver_rows
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, read_metrics
from lib.solvers import ADJOINT_SOLVERS, SOLVERS
from parameters import slow_but

SIX = "--pretrain_steps 2 --max_step 6 --max_eval_steps 1".split()
SPELLING = "--{}"
DROPOUT = "--dropout 0.1 --dropatt 0.1 --jac_loss_weight 1 --jac_loss_freq 1"


@dataclass
class Trained:
    """A run: its training records, its log, and the gradients that each step was given."""

    steps: list[dict]
    log: str
    gradients: list[dict[str, torch.Tensor]]

    @property
    def losses(self):
        return [r["loss"] for r in self.steps]


@pytest.fixture
def run(train, run_folder, monkeypatch):
    """Train with a gradient, and more flags: two stacked steps, four at equilibrium."""
    seen, real = [], LMTrainer.set_learning_rate

    def note(trainer):  # after backward, before the update
        named = trainer.model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        real(trainer)

    monkeypatch.setattr(LMTrainer, "set_learning_rate", note)

    def go(grad, *more, name="run"):
        seen.clear()
        solver = ["--f_solver", "broyden"] if grad.startswith("shine") else []
        records = train(*SIX, "--grad", grad, *solver, *more, name=name)
        steps = [r for r in records if r["kind"] == "train"]
        return Trained(steps, (run_folder.parent / name / LOG).read_text(), list(seen))

    return go


def check(found, grad="ift", *, f_thres=6):
    """All that has to hold of the steps with that gradient."""
    check_steps(found.steps, found.log, grad, SPELLING, f_thres)
    assert "forward 0, backward 0" in found.log
    assert all(r["forward_rel_residual"] < 1 for r in found.steps[2:])
    assert all(r["backward_nfe"] <= 7 for r in found.steps[2:] if "backward_nfe" in r)
    assert all(r.get("backward_rel_residual", 0) < 1 for r in found.steps[2:])

    # From the equilibrium, gradients reach all that they reach by plain autograd.
    stacked = {name for name, g in found.gradients[1].items() if g.any()}
    assert {"word_emb.emb_layers.0.weight", "inject_conv.weight"} < stacked
    for gradients in found.gradients[2:]:
        assert all(g.isfinite().all() for g in gradients.values())
        assert stacked <= {name for name, g in gradients.items() if g.any()}


def test_every_name_is_here():
    names = [{text.partition(":")[0] for text in texts} for texts in (FORWARD, BACKWARD, GRADS)]
    assert names == [set(SOLVERS), set(ADJOINT_SOLVERS), set(GRADIENTS)]


# ---- six steps -------------------------------------------------------------------------------


# The others are slow: test_exact_gradients_train_alike trains with each of them, too.
@pytest.mark.parametrize(
    "solver", slow_but(["anderson", "newton_krylov", "broyden:stop=sample"], FORWARD)
)
def test_forward_solver(run, solver):
    check(run("ift", "--f_solver", solver))


@pytest.mark.parametrize(
    "solver", slow_but(["bicgstab", "gmres:restart=4", "None"], [*BACKWARD, "None"])
)
def test_backward_solver(run, solver):
    check(run("ift", "--b_solver", solver))


_WITH_DROPOUT = ("shine", "phantom", "reversible", "unroll")  # without it, they are slow


@pytest.mark.parametrize(
    ("grad", "more"),
    [
        *slow_but(
            product([g for g in GRADS if g not in _WITH_DROPOUT], [""]), product(GRADS, [""])
        ),
        *product(_WITH_DROPOUT, [DROPOUT]),
    ],
)
def test_gradient(run, grad, more):
    found = run(grad, *more.split())
    check(found, grad)
    if grad.startswith(("reversible", "unroll")):
        assert {r.get("forward_nfe") for r in found.steps} == {None, 6}
    assert ["jac_loss" in r for r in found.steps] == [False] * 2 + [bool(more)] * 4


def test_commands_of_the_readme(run):
    steps = "phantom:steps=3,damping=0.8"
    check(run(steps, "--f_thres", 6), steps)
    solvers = ["--f_solver", "broyden:memory=8,stop=sample", "--b_solver", "gmres"]
    check(run("ift", *solvers, name="solvers"))


@pytest.mark.parametrize("grad", slow_but(GRADIENTS, GRADS))
def test_bfloat16(run, grad):
    """Three steps at equilibrium, close to those in float32: bfloat16 has 8 bits."""
    exact = run(grad, "--max_step", 5)
    half = run(grad, "--max_step", 5, "--amp", "bf16", name="half")
    assert half.losses != exact.losses
    assert half.losses == pytest.approx(exact.losses, rel=0.02)
    assert ["backward_nfe" in r for r in half.steps] == [False] * 2 + [grad in SOLVES_BACK] * 3
    assert all(g.isfinite().all() for step in half.gradients for g in step.values())


MORE = ["", DROPOUT, "--amp bf16 --pre_lnorm --wnorm --batch_chunk 2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")  # six evaluations are few for Newton
@pytest.mark.parametrize(
    ("f_solver", "b_solver", "grad", "more"),
    [(*names, MORE[(i + i // 6) % 3]) for i, names in enumerate(COMBINATIONS)],  # each with each
)
def test_combination(run, f_solver, b_solver, grad, more):
    solvers = ["--f_solver", f_solver, "--b_solver", b_solver]
    found = run(grad, *solvers, *more.split())
    assert all(math.isfinite(loss) for loss in found.losses)
    assert ["backward_nfe" in r for r in found.steps] == [False] * 2 + [grad in SOLVES_BACK] * 4


# ---- what is exact is the same ---------------------------------------------------------------

# Gradient descent, without clipping: it does not turn rounding into whole steps, as Adam does.
# Three steps at equilibrium: a wrong gradient shows in the loss of the second.
DESCENT = "--optim SGD --lr 0.5 --clip 0 --f_thres 120 --b_thres 60 --max_step 5".split()
CLOSE = ["--f_solver", "broyden:eps=1e-6", "--b_solver", "broyden:eps=1e-6"]


@pytest.fixture(scope="module")
def exact():
    """The run that others are compared with, made once."""
    return {}


@pytest.fixture
def reference(run, exact):
    if not exact:
        exact["run"] = run("ift", *DESCENT, *CLOSE, name="reference")
    return exact["run"]


def tight(text):
    return text + (",eps=1e-6" if ":" in text else ":eps=1e-6")


@pytest.mark.parametrize(
    ("grad", "flag", "value"),
    [
        *(("ift", "--f_solver", tight(solver)) for solver in FORWARD),
        *(("ift", "--b_solver", tight(solver)) for solver in BACKWARD),
        ("unroll", "--f_thres", 60),
        pytest.param("unroll:damping=0.8", "--f_thres", 60, marks=pytest.mark.slow),
        ("reversible:damping=0.6", "--f_thres", 40),
        ("shine:refine=60", "--f_thres", 60),
        ("phantom:steps=30,damping=1", "--f_thres", 60),
        ("phantom:steps=40,damping=0.8,form=neumann", "--f_thres", 60),
    ],
)
def test_exact_gradients_train_alike(run, reference, grad, flag, value):
    """Up to what is left of the residual: 1e-6, but for 40 evaluations of a coupled iteration."""
    found = run(grad, *DESCENT, *CLOSE, flag, value)
    rel = 1e-3 if grad.startswith("reversible") else 1e-5
    assert found.losses == pytest.approx(reference.losses, rel=rel)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize(
    ("grad", "least"),
    [("jfb", 0.7), ("shine", 0.7), ("shine:refine=2", 0.95), ("phantom", 0.9)],
)
def test_others_point_the_same_way(run, reference, grad, least):
    """Cosine with the exact gradient, of the same weights: in the first step at equilibrium."""
    found = run(grad, *DESCENT, *CLOSE)
    assert found.losses[:3] == pytest.approx(reference.losses[:3], rel=1e-6)
    assert found.losses != pytest.approx(reference.losses, rel=1e-5)
    assert found.gradients[2].keys() == reference.gradients[2].keys()
    one, other = flat(found.gradients[2]), flat(reference.gradients[2])
    assert least < torch.cosine_similarity(one, other, dim=0) < 0.9999


@pytest.mark.parametrize(("grad", "same"), SAME)
def test_same_by_another_name(run, grad, same):
    """Bit for bit, with dropout and the Jacobian loss."""
    more = [*DROPOUT.split(), "--f_solver", "broyden"]
    found, again = run(grad, *more), run(same, *more, name="same")
    assert found.losses == again.losses


# ---- learning, going on, evaluation ----------------------------------------------------------


# The exact ones train alike, and the others point the same way, see above.
@pytest.mark.parametrize("grad", slow_but(["jfb"], GRADIENTS))
def test_it_learns(run, grad):
    """At equilibrium, from the first step on."""
    found = run(grad, "--pretrain_steps", 0, "--max_step", 80, "--log-interval", 20).losses
    assert found[-1] < found[0] - 0.25
    assert max(found[2:]) < found[0]


@pytest.mark.parametrize("grad", slow_but(["phantom"], GRADS))
def test_restarted_at_equilibrium(flags, run_folder, stop_at, grad):
    """Saved after step 4, stopped after step 5: bit for bit the run that was not."""
    solver = ["--f_solver", "broyden"] if grad.startswith("shine") else []
    argv = [*flags, *SIX, *DROPOUT.split(), "--jac_loss_freq", "0.5", "--rand_f_thres_delta", "2"]
    argv += [*solver, "--grad", grad, "--save-interval", "4"]
    assert main([*argv, "--name", "whole"]) == 0
    stop_at(5)
    assert main(argv) == 130
    assert load(run_folder / CHECKPOINT)["step"] == 4
    assert main([*argv, "--restart"]) == 0
    whole = run_folder.parent / "whole"
    records, expected = (
        [
            {k: v for k, v in r.items() if not k.endswith(("_per_s", "_mib"))}
            for r in read_metrics(folder)
        ]
        for folder in (run_folder, whole)
    )
    assert records == expected
    a, b = load(run_folder / WEIGHTS), load(whole / WEIGHTS)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_gradient_may_change_at_a_restart(flags, run_folder):
    argv = [*flags, *SIX]
    assert main([*argv, "--max_step", "4"]) == 0
    assert main([*argv, "--restart", "--grad", "jfb"]) == 0
    log = (run_folder / LOG).read_text()
    assert "changed since the checkpoint: --grad from 'ift' to 'jfb'" in log
    steps = [r for r in read_metrics(run_folder) if r["kind"] == "train"]
    assert ["backward_nfe" in r for r in steps] == [False] * 2 + [True] * 2 + [False] * 2


def test_evaluation_with_other_gradients(train, flags, capsys):
    """Those that follow a solver leave evaluation to it; the others evaluate f to the threshold."""
    train(*SIX, "--grad", "phantom")
    texts = {}
    for grad in ("ift", "jfb", "phantom", "unroll", "reversible"):
        capsys.readouterr()
        assert main([*flags, "--eval", "--grad", grad, "--max_eval_steps", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        texts[grad] = "\n".join(line for line in lines if not line.startswith("note: "))
    assert texts["ift"] == texts["jfb"] == texts["phantom"] != texts["unroll"]
    assert texts["unroll"].count("nfe 6.0") == texts["reversible"].count("nfe 6.0") == 2


# ---- reports ---------------------------------------------------------------------------------

SMALL = """
    --dataset wt103 --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --pretrain_steps 2
    --max_step 5 --tgt_len 8 --mem_len 8 --eval_tgt_len 16 --batch_size 4 --eval_batch_size 4
    --max_eval_steps 1 --f_thres 6 --log-interval 1 --num_threads 1
""".split()


@pytest.mark.parametrize(
    "grad", slow_but(["reversible"], [g for g in GRADS if g not in SOLVES_BACK])
)
def test_quickstart_reports_forward_solves_alone(corpus_folder, tmp_path, capsys, grad):
    argv = [*SMALL, "--data", str(corpus_folder), "--f_solver", "broyden", "--grad", grad]
    assert quickstart.main(argv, tmp_path) == 0
    folder = tmp_path / "LM-TFM-wt103" / "quickstart"
    text = (folder / "report.txt").read_text()
    assert "nan" not in text.split("a few words")[0].lower()
    assert "backward" not in text
    table = {line[0]: line[1:] for line in (re.split("  +", x) for x in text.splitlines())}
    solved = [r for r in read_metrics(folder) if "forward_nfe" in r]
    assert len(solved) == 3
    residual, nfe = map(float, table["forward, training mean"])
    assert residual == pytest.approx(sum(r["forward_rel_residual"] for r in solved) / 3, rel=0.01)
    assert nfe == pytest.approx(sum(r["forward_nfe"] for r in solved) / 3, abs=0.05)
    assert float(table["forward, evaluation mean"][1]) > 0
    assert (folder / "curves.png").stat().st_size > 10_000


def test_progress_of_a_run(train, flags, capsys):
    more = [*SIX, "--grad", "phantom:steps=2,damping=0.8", "--f_solver", "anderson:m=3"]
    train(*more)
    capsys.readouterr()
    assert run_progress.main(["train_transformer.py", *flags, *more]) == 0
    assert capsys.readouterr().out == "finished 6\n"


FORWARD_ONLY = [
    {"kind": "train", "step": 1, "loss": 3.0},
    {"kind": "train", "step": 2, "loss": 3.0, "forward_nfe": 8.0, "forward_rel_residual": 0.3},
    {"kind": "train", "step": 3, "loss": 3.0, "forward_nfe": 6.0, "forward_rel_residual": 0.1},
]
EVALUATED = {"rel_residual": 0.05, "nfe": 9.0}


def test_rows_of_a_stacked_run():
    """No solve, no figures."""
    nothing = {"rel_residual": 0.0, "nfe": 0.0}
    assert solver_rows(FORWARD_ONLY[:1], 1, nothing)[1:] == []


def test_rows_of_a_run_that_changed_its_gradient():
    """The mean of a pass is over the steps that solved it."""
    also_backward = FORWARD_ONLY[2] | {"backward_nfe": 5.0, "backward_rel_residual": 0.2}
    rows = solver_rows([*FORWARD_ONLY[:2], also_backward], 1, EVALUATED)
    assert rows[1:3] == [
        ("forward, training mean", "2.00e-01", "7.0"),
        ("backward, training mean", "2.00e-01", "5.0"),
    ]


@pytest.mark.filterwarnings("error")
def test_curves_of_forward_solves_alone(tmp_path):
    drawn = []

    def draw(axes):
        axes.plot([1, 2], [1, 2], label="loss")
        drawn.append(axes)

    draw_curves(FORWARD_ONLY, 1, tmp_path / "curves.png", draw)
    bottom = drawn[0].figure.axes[1]
    assert [text.get_text() for text in bottom.get_legend().get_texts()] == ["forward residual"]
    assert list(bottom.lines[0].get_ydata()) == [0.3, 0.1]


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", REFUSED)
def test_what_is_refused(flags, tmp_path, capsys, recwarn, settings):
    argv, parts = refusal(settings, SPELLING)
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags, *argv]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("train_transformer.py: ")
    assert [part for part in parts if part not in line] == []
    assert captured.out == ""
    assert len(recwarn) == 0
    assert sorted(tmp_path.rglob("*")) == before == []


@pytest.mark.parametrize("damping", [0.5, 0.8, 0.95])
def test_the_threshold_that_a_refusal_names_works(flags, capsys, damping):
    argv = [*flags, "--grad", f"reversible:damping={damping}", "--f_thres"]
    assert main([*argv, "99"]) == 2
    (most,) = re.findall(r"lower --f_thres to (\d+)", capsys.readouterr().err)
    assert parse([*argv, most]).f_thres == int(most)
    assert main([*argv, str(int(most) + 1), "--debug"]) == 2
