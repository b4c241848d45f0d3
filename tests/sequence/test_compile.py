"""--compile: the same run up to rounding, and no compilation after the first of its kind."""

import copy
from functools import partial

import pytest
import torch

from lib.graphs import _try_compiler
from lib.runs.run_folder import read_metrics
from small_model import build, words

# Untrained layers, and few iterations.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


@pytest.fixture(autouse=True)
def _compilers_are_tried_again():
    _try_compiler.cache_clear()
    torch._dynamo.reset()
    yield
    _try_compiler.cache_clear()


@pytest.fixture
def without_code(monkeypatch):
    """Trace as torch.compile does, but generate no code, which takes seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def steps(model, n, seed=0, amp=False):
    """Losses of ``n`` training steps with the Jacobian loss, memory carried along."""
    optimizer, mems, losses = torch.optim.SGD(model.parameters(), lr=1e-3), [], []
    torch.manual_seed(seed)
    for step in range(n):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, jac_loss, _, *mems = model(*words(seed=step), mems, f_thres=6, b_thres=6)
        (loss.float().mean() + jac_loss.float().sum()).backward()
        optimizer.step()
        losses.append(loss.float().mean().item() + jac_loss.item())
    assert all(p.grad is not None for p in model.func.parameters())
    return losses


@pytest.mark.parametrize(
    ("settings", "amp"), [({"dropout": 0.2}, False), ({"dropatt": 0.2, "pre_lnorm": True}, True)]
)
def test_no_forward_compiles_again(without_code, settings, amp):
    model = build(wnorm=True, **settings)
    model.func.compile_evaluations()
    steps(model, 4, amp=amp)  # memory grows to its full length
    before = graphs()
    assert before > 0
    found = steps(model, 5, amp=amp)
    assert graphs() == before
    assert len(set(found)) == 5


def test_a_copy_of_a_compiled_model(without_code):
    model = build()
    model.func.compile_evaluations()
    twin = copy.deepcopy(model)
    assert steps(model, 3) == steps(twin, 3)


def test_refused_in_one_line(flags, monkeypatch, capsys):
    from deq_sequence.command import main

    def failing(function, **options):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", failing)
    assert main([*flags, "--compile"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_transformer.py: torch.compile does not work here (no g++)")


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_compiled_run_is_the_same_up_to_rounding(train, run_folder, amp):
    flags = ("--jac_loss_weight", 1, "--jac_loss_freq", 1, "--wnorm", "--amp", amp)
    train(*flags, name="plain")
    train(*flags, "--compile", name="compiled")
    plain, found = (
        [r["loss"] for r in read_metrics(run_folder.parent / name) if "loss" in r]
        for name in ("plain", "compiled")
    )
    # A solve may stop an evaluation earlier or later: bfloat16 rounds to 4e-3.
    assert found == pytest.approx(plain, rel=1e-4 if amp == "none" else 1e-2)
