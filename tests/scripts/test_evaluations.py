"""scripts/evaluations.py: bad input, and its figures where all of them are known.

Its reports of real runs are tested beside each trainer.
"""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from evaluations import main
from gradient_errors import Report, Row, measure
from lib.deq import DEQ
from lib.runs.task import Summands
from toy_trainer import ToyTrainer

A = 0.6
NEUMANN = "phantom:steps=60,form=neumann"
DATA = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [0.5, -2.0]], dtype=torch.float64)


def fails(capsys, *argv):
    """The one line that a call with bad input prints."""
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_folders_that_hold_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone", "docs/models/words.safetensors"):
        line = fails(capsys, folder)
        assert line.startswith(f"evaluations.py: {folder} holds no run: expected a folder with")


def test_bad_flags(tmp_path, capsys):
    said = "--batches is 1, but must be an integer of at least 2"
    assert said in fails(capsys, tmp_path, "--batches", 1)
    assert "did you mean --weights?" in fails(capsys, tmp_path, "--weight", "a")


# ---- figures of the equation z = a z + x -------------------------------------------------------


class Line(nn.Module):
    """z = a z + x, whose fixed point is x / (1 - a)."""

    def __init__(self, grad):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(A))
        self.deq = DEQ("fixed_point_iteration:eps=1e-12", "gmres:eps=1e-12", grad=grad)

    def forward(self, x, f_thres):
        return self.deq(lambda z: self.a * z + x, torch.zeros_like(x), f_thres=f_thres).z


class LineTrainer(ToyTrainer):
    """The loss is the mean of z^2 / 2 over a batch of two numbers, in two parts."""

    def __init__(self, grad):
        super().__init__()
        self.model = Line(grad)

    def split(self, batch):
        return batch[0].chunk(2)

    def part(self, index, part, choices):
        loss = self.model(part[None], choices.f_thres).square().sum() / 4
        return Summands(loss, loss.new_zeros(()), [])


def report(grad, own):
    return measure(LineTrainer(grad), own, ([row] for row in DATA))


def iterate(n):
    """z after n steps from 0, for x = 1."""
    return (1 - A**n) / (1 - A)


@pytest.mark.parametrize(("own", "thresholds"), [(3, [1, 2, 3, 4, 6]), (5, [1, 2, 3, 4, 5, 6, 8])])
def test_every_figure(own, thresholds):
    found = report("jfb", own)
    squares = DATA.square().mean(dim=1)  # of each batch: its loss is this times z^2 / 2 for x = 1
    exact = squares / (1 - A) ** 3  # dL/da
    assert [row.threshold for row in found.rows] == thresholds
    near = partial(pytest.approx, rel=1e-4)  # a is 0.6 in float32, and solves end at 1e-6
    for row in found.rows:
        n = row.threshold
        after, before = iterate(n), iterate(n - 1)
        assert row.evaluations == n
        assert row.residual == near((after - before) / after)
        assert row.loss == near(squares.mean().item() * after**2 / 2)
        assert row.difference == pytest.approx(row.loss - found.loss)
        error = 1 - after * before * (1 - A) ** 3  # jfb has the gradient of the last step alone
        assert [row.error, row.mean_error] == near([error, error])
        assert math.isnan(row.cosine) if n == 1 else row.cosine == near(1)  # at 1 there is none
    noise = exact.std() / exact.square().mean().sqrt()
    assert found.noise == near(noise.item())
    assert found.loss == near(squares.mean().item() / (1 - A) ** 2 / 2)
    assert 0 < found.residual <= 1e-6
    assert (found.batches, found.graphs, found.products) == (3, 1, 0)


@pytest.mark.parametrize(
    ("grad", "graphs"),
    [
        ("ift", 1),
        (NEUMANN, 1),
        ("phantom:steps=3", 3),
        ("unroll", 0),
        ("unroll:checkpointing=true", None),
        ("reversible:damping=0.8", None),
    ],
)
def test_gradients(grad, graphs):
    """With enough evaluations, none of them but a phantom of three steps has an error left."""
    found = report(grad, 24)
    assert (found.gradient, found.graphs) == (grad.partition(":")[0], graphs)
    assert found.again(found.rows[-1]) == (found.rows[-1].evaluations if graphs is None else graphs)
    assert found.products == pytest.approx({"ift": 2, NEUMANN: 59}.get(grad, 0))
    errors = {row.threshold: row.error for row in found.rows}
    if graphs == 3:
        assert errors[24] == pytest.approx((1 - 0.5 * (1 - A)) ** 3, rel=1e-4)
        assert "More evaluations hardly change it" in said(found)
    else:
        assert errors[24] < 0.01
        assert found.enough == min(n for n, e in errors.items() if e < found.noise / 2)
    assert max(errors) == (24 if "reversible" in grad else 48)  # it could not undo more
    assert str(found).startswith("solver fixed_point_iteration, " if graphs else "gradient")


def test_the_solver_and_the_gradient_are_put_back():
    trainer = LineTrainer("jfb")
    deq = trainer.model.deq
    before = deq.f_solver, deq.b_solver, deq.grad
    measure(trainer, 2, ([row] for row in DATA))
    assert (deq.f_solver, deq.b_solver, deq.grad) == before


# ---- the sentences -----------------------------------------------------------------------------


def of(errors, own, **changes):
    """A report with these errors at these thresholds, and a noise of 1."""
    rows = [Row(n, float(n), 0.1, 2.0, 0.0, e, 0.9, e) for n, e in errors.items()]
    small = [n for n in errors if all(errors[m] < 0.5 for m in errors if m >= n)]
    found = Report(
        "anderson", "jfb", own, 4, 1, 0.0, 2.0, 1e-7, 1e-7, 1.0, min(small, default=None), rows
    )
    return replace(found, **changes)


def said(found):
    return " ".join(found.said())


def test_what_is_said():
    errors = {1: 2.0, 2: 0.4, 3: 0.7, 4: 0.45, 6: 0.3, 8: 0.2}
    assert " 6*" in str(of(errors, own=6))
    text = said(of(errors, own=6))
    assert "From threshold 4 on, the error of the gradient is below 0.5 of the noise of" in text
    assert "at 4 it is 0.450 of the noise, at its own threshold 6 it is 0.300 of the noise." in text
    assert text.endswith("A hint, no promise: 4 may do, with 71% of the evaluations.")
    assert said(of(errors, own=4)).endswith("That is the run's own threshold.")
    assert said(of(errors, own=3)).endswith("at its own threshold 3 it is 0.700 of the noise.")
    none = said(of({1: 2.0, 2: 1.5, 4: 0.9}, own=2))
    assert "No threshold of the table brings" in none
    assert none.endswith("threshold 2 it is 1.500 of the noise, at 4 0.900 of the noise.")
    last = said(of({1: 2.0, 2: 0.9}, own=2))  # no more evaluations were tried
    assert last.endswith("threshold 2 it is 0.900 of the noise, at 2 0.900 of the noise.")
    stalled = said(of({1: 2.0, 2: 0.9, 4: 0.9}, own=2))
    assert stalled.endswith("There the solves still end at a residual of 1.0e-01.")


def test_no_hint_without_an_exact_solve():
    uncertain = of({1: 2.0, 2: 0.4, 3: 0.3}, own=3, residual=math.nan)
    assert "No hint: the exact solves ended at residuals of nan (fixed point) and 1.0e-07" in said(
        uncertain
    )
    assert "No hint" in said(of({1: 2.0, 2: 0.4}, own=2, adjoint_residual=math.nan))
    assert uncertain.as_dict()["residual"] is None
    assert json.loads(json.dumps(uncertain.as_dict(), allow_nan=False))["said"] == uncertain.said()
