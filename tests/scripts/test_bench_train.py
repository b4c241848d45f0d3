"""bench_train.py: its plain forms compute what ours do, and the command works."""

import json
import sys
from functools import partial

import pytest
import torch
from bench_train import main
from helpers import floor, steps
from helpers.plain_solvers import PLAIN, torchdeq_solver
from helpers.settings import FORMS, SIZES, Options
from helpers.steps import flops, interleaved, least_bytes, peak_bytes, shares, spectral_radius
from helpers.tasks import make_task

from lib.errors import InputError
from lib.solvers import SOLVERS
from problems import contraction, symmetric

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")

CPU = torch.device("cpu")
# Gains with which f is a contraction at these sizes, so that both forms reach the same point.
CONTRACTIVE = {"wt103": 4.0, "cifar": 0.07, "image": 0.1, "citys": 0.1}


def options(name="wt103", **changes):
    changes = {"gain": CONTRACTIVE[name[:5]], "dtype": torch.float64, **changes}
    return Options(size=SIZES["tiny"], device=CPU, **changes)


def tight_task(name, form, **changes):
    """A task whose solves end at 1e-12."""
    task = make_task(name, FORMS[form], options(name, **changes))
    solver = partial((PLAIN if form == "plain" else SOLVERS)["broyden"], eps=1e-12)
    task.model.f_solver = task.model.b_solver = solver
    return task


def step(task, index):
    """Loss and gradients of a step, which is taken."""
    task.begin(index)
    task.f_thres = task.b_thres = 400
    task.optimizer.zero_grad()
    loss = task.loss()
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in task.model.parameters()])
    task.update()
    return loss.detach(), gradients


def close(found, expected, tolerance):
    return (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "name",
    [
        "wt103_deq_transformer",
        "wt103_deq_transformer_reg",  # with dropout of attention weights
        "wt103_deq_transformer_preln_reg",
        "cifar/cls_mdeq_TINY",
        "imagenet/cls_mdeq_SMALL_reg",
        "cityscapes/seg_mdeq_SMALL",
    ],
)
def test_plain_and_fast_forms_agree(name):
    """Losses and gradients, in float64; the second step of a language model has a memory."""
    plain, fast = (tight_task(name, form, jac_freq=1.0) for form in ("plain", "fast"))
    assert plain.model.state_dict().keys() == fast.model.state_dict().keys()
    for index in range(2 if name.startswith("wt103") else 1):
        (loss, gradients), (expected, like) = step(plain, index), step(fast, index)
        assert plain.with_jac == fast.with_jac == (plain.jac_weight > 0)
        assert close(loss, expected, 1e-9)
        assert close(gradients, like, 1e-8)


@pytest.mark.parametrize("method", ["broyden", "anderson"])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("problem", [contraction(), symmetric(radius=0.9)], ids=["contr", "symm"])
def test_plain_solvers_make_the_same_iterates(method, stop_mode, problem):
    visited = {"plain": [], "ours": []}
    found = {}
    for side, solvers in (("plain", PLAIN), ("ours", SOLVERS)):

        def f(z, points=visited[side]):
            points.append(z.clone())
            return problem.f(z)

        solve = solvers[method]
        found[side] = solve(f, problem.x0, threshold=9, eps=1e-12, stop_mode=stop_mode)
    for a, b in zip(visited["plain"], visited["ours"], strict=True):
        assert (a - b).norm() <= 1e-8 * (1 + b.norm())
    plain, ours = found["plain"], found["ours"]
    assert (plain["result"] - ours["result"]).norm() <= 1e-8 * ours["result"].norm()
    assert plain["nfe"] == ours["nfe"]
    assert plain["nstep"] == ours["nstep"]
    assert plain["rel_trace"] == pytest.approx(ours["rel_trace"], rel=1e-6)


def test_plain_solvers_stop_and_return_the_best_point():
    problem = contraction()
    for solve in PLAIN.values():
        found = solve(problem.f, problem.x0, threshold=40, eps=1e-10)
        assert found["nfe"] < 30
        assert found["lowest"] == min(found["rel_trace"]) < 1e-10
        assert torch.allclose(found["result"], problem.solution, atol=1e-8)


def test_torchdeq_solvers():
    pytest.importorskip("torchdeq")
    problem = contraction()
    for method in PLAIN:
        found = torchdeq_solver(method)(problem.f, problem.x0, threshold=40, eps=1e-6)
        assert torch.allclose(found["result"], problem.solution, atol=1e-4)
        assert found["rel_trace"][found["nstep"]] < 1e-6


def test_without_torchdeq_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(InputError, match="pip install --no-deps torchdeq"):
        torchdeq_solver("broyden")


def test_float32_losses_agree_over_steps():
    tasks = {
        form: make_task("wt103_deq_transformer", FORMS[form], options(dtype=torch.float32))
        for form in ("plain", "fast")
    }
    found = interleaved(tasks, steps=4, warmup=1)
    assert found["plain"].losses == pytest.approx(found["fast"].losses, rel=1e-4)
    assert len(found["plain"].losses) == 5
    assert len(found["plain"].totals) == 4
    assert min(found["plain"].totals) > 0


def test_measurements():
    task = make_task("cifar/cls_mdeq_TINY", FORMS["plain"], options("cifar", dtype=torch.float32))
    inside = shares(task, 0)
    assert sum(inside.parts) == pytest.approx(1)
    assert min(inside.parts) > 0
    assert inside.solver_bytes > 0
    assert flops(task, 1) > 1e6
    parameters = sum(p.nbytes for p in task.model.parameters())
    assert 4 * parameters < peak_bytes(task, 2) < 400 * parameters
    assert (spectral_radius(task, 3) > 0).all()
    assert task.model.f_solver is PLAIN["broyden"]  # put back


def test_least_bytes():
    # Four passes per evaluation, then 2 (0 + 1) or 2 (1 + 2) reads of earlier vectors.
    assert least_bytes("broyden", 3, 8) == 8 * (12 + 2)
    assert least_bytes("anderson", 3, 8) == 8 * (12 + 6)
    assert least_bytes("fixed_point_iteration", 3, 8) == 8 * 12


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is of the whole process
    monkeypatch.setattr(floor, "_REPEATS", 1)
    monkeypatch.setattr(floor, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(steps, "RADIUS_ITERS", 2)
    out = tmp_path / "out.json"
    settings, forms = "wt103_deq_transformer_reg,cifar/cls_mdeq_TINY", "plain,fast-bf16"
    flags = ["--settings", settings, "--forms", forms, "--jac-freq", "1", "--json", str(out)]
    flags += ["--tiny", "--steps", "1", "--warmup", "1", "--threads", "1"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    records = json.loads(out.read_text())
    assert [record["setting"] for record in records] == settings.split(",")
    for record in records:
        assert f"## {record['setting']}" in printed
        assert list(record["forms"]) == forms.split(",")
        for found in record["forms"].values():
            assert len(found["steps"]) == 1
            assert found["floor"] > 0
    assert [record["regularised_steps"] for record in records] == [1, 0]
    rows = [line for line in printed.splitlines() if line.startswith("| fast-bf16")]
    assert len(rows) == 2


@pytest.mark.slow
def test_compiled_form():
    tasks = {
        form: make_task("wt103_deq_transformer", FORMS[form], options(dtype=torch.float32))
        for form in ("fast", "fast-compile")
    }
    found = interleaved(tasks, steps=2, warmup=1)
    assert found["fast-compile"].losses == pytest.approx(found["fast"].losses, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--settings", "cifar/cls_mdeq_TINI"], "did you mean cifar/cls_mdeq_TINY"),
        (["--forms", "fats"], "did you mean fast"),
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "many"], "invalid int value"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--jac-freq", "2"], "--jac-freq is 2.0"),
        (["--settings", "images", "--gain", "3"], "at most 1"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    assert main(["--tiny", *flags]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert said in printed.err
    assert printed.out == ""
