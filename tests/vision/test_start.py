"""DEQ.F_START learned: the same fixed point and gradients of f, fewer evaluations."""

from argparse import Namespace

import pytest
import torch

import mdeq_vision
from harness import assert_same_run
from lib.errors import InputError
from lib.runs.checkpoint import load_state
from lib.runs.run_folder import WEIGHTS
from mdeq_vision.command import load_config
from mdeq_vision.datasets import get_cls_dataset
from mdeq_vision.model import MDEQClsNet
from mdeq_vision.start import PREFIX, Start, distance
from small_digits import SMALL
from small_runs import DIGITS, ROOM, TINY_DIGITS, run_tool
from small_vision import (
    EQUILIBRIUM,
    STACKED,
    THRESHOLD,
    build,
    freeze_batch_norm,
    images,
    relative_error,
    tiny_config,
)

LEARNED = {"DEQ__F_START": "learned"}


def pair(kind="cls"):
    """Two models with the same weights, from zero and from a guess that is not zero."""
    zero, learned = build(kind), build(kind, **LEARNED)
    learned.load_state_dict({**learned.state_dict(), **zero.state_dict()})
    for model in (zero, learned):
        freeze_batch_norm(model)
    return zero, learned


def run(model, x, phase=EQUILIBRIUM):
    """The output and the gradients of its squared sum, of the start and of the rest."""
    output, *_ = model(x, phase, f_thres=THRESHOLD, b_thres=THRESHOLD)
    output.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    own = {name: g for name, g in grads.items() if name.startswith(PREFIX)}
    return output, own, {name: g for name, g in grads.items() if name not in own}


@pytest.mark.parametrize("kind", ["cls", "seg"])
def test_fixed_point_and_gradients_are_those_from_zero(kind):
    zero, learned = pair(kind)
    x = images(8, 8)
    with torch.no_grad():
        assert any(p.abs().max() > 0.1 for p in learned._equation(x)[2])  # another start
    expected, found = run(zero, x), run(learned, x)
    assert not expected[1]
    assert found[1].keys() == {name for name in learned.state_dict() if name.startswith(PREFIX)}
    # The solves end at 1e-12, the gradient's system at the same.
    assert relative_error(found[0], expected[0]) < 1e-9
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert (found[2][name] - grad).norm() <= 1e-8 * (1 + grad.norm()), name


def test_from_the_same_state_the_rest_is_the_same_bit_for_bit():
    """A new start guesses zero: output and gradients are those of a model without one."""
    models = []
    for more in ({}, LEARNED):
        torch.manual_seed(3)
        models.append((MDEQClsNet(tiny_config(**more)).double(), torch.rand(1)))
    (zero, next_zero), (learned, next_learned) = models
    assert torch.equal(next_zero, next_learned)  # it takes no random numbers from the others
    own = {key for key in learned.state_dict() if key.startswith(PREFIX)}
    assert list(zero.state_dict()) == [key for key in learned.state_dict() if key not in own]
    x = images(8, 8)
    for phase in (STACKED, EQUILIBRIUM):
        expected, found = run(zero, x, phase), run(learned, x, phase)
        assert torch.equal(expected[0], found[0])
        assert all(torch.equal(found[2][name], grad) for name, grad in expected[2].items())
        assert found[1]


def test_the_loss_of_the_start():
    """Its gradient, as autograd gives it alone; the guess in formulas."""
    _, learned = pair()
    x = images(8, 8)
    _, own, _ = run(learned, x)
    with torch.no_grad():
        f, _, guess = learned._equation(x)
        star = learned.deq(f, guess, f_thres=THRESHOLD, training=False).z_star
    _, _, guess = learned._equation(x)
    errors = [(p - z).square().sum() for p, z in zip(guess, star, strict=True)]
    loss = sum(errors) / sum(z.square().sum() for z in star)
    names, parameters = zip(*learned.start.named_parameters(), strict=True)
    for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        assert relative_error(own[f"start.{name}"], grad) < 1e-6
    assert distance(star, star) == 0
    assert distance([torch.zeros_like(z) for z in star], star).item() == pytest.approx(1)


@pytest.mark.slow
def test_a_trained_start_saves_evaluations():
    """On images that it was not trained on, for the model in the repository."""
    model = mdeq_vision.load(ROOM.parent / "docs/models/digits.safetensors").model
    data = get_cls_dataset(load_config(Namespace(cfg=DIGITS)), "valid")
    seen, other = (torch.stack([data[i][0] for i in part]) for part in (range(60), range(60, 120)))
    solved = model.deq.stats.forward

    def solve(x):
        f, _, guess = model._equation(x)
        return model.deq(f, guess, f_thres=30, training=False).z_star

    with torch.no_grad():
        star, expected = solve(seen), solve(other)
    from_zero = solved.last["nfe"]
    torch.manual_seed(0)
    model.start = Start(model.channels)
    injection = model.downsample(seen)
    adam = torch.optim.Adam(model.start.parameters(), lr=0.003)
    for _ in range(60):
        adam.zero_grad()
        distance(model.start(injection, star), star).backward()
        adam.step()
    with torch.no_grad():
        found = solve(other)
    assert solved.last["nfe"] < from_zero
    for own, same in zip(found, expected, strict=True):
        assert relative_error(own, same) < 5e-3  # both stop at a residual of 1e-3


def test_a_film_begins_at_the_guess():
    _, learned = pair()
    learned.eval()
    x = images(8, 8)
    learned.f_thres = THRESHOLD
    visited = []
    solve = learned.deq.f_solver
    learned.f_solver = lambda f, z, **options: visited.append(z.clone()) or solve(f, z, **options)
    learned.follow(x)
    with torch.no_grad():
        guess = learned._equation(x)[2]
    expected = torch.cat([p.flatten(1) for p in guess], dim=1)
    assert torch.equal(visited[0].flatten(1), expected)


def test_odd_sizes_and_dtypes():
    start = Start([4, 6, 4])
    z0 = [torch.zeros(2, c, *size) for c, size in ((4, (7, 5)), (6, (4, 3)), (4, (2, 2)))]
    guess = start(torch.randn(2, 4, 7, 5), z0)
    assert [p.shape for p in guess] == [z.shape for z in z0]
    with torch.autocast("cpu", torch.bfloat16):
        assert {p.dtype for p in start(torch.randn(2, 4, 7, 5), z0)} == {torch.float32}


def test_weights_with_and_without_a_start():
    zero, learned = pair()
    load_state(zero, learned.state_dict(), "learned.pt")  # serves without it
    with pytest.raises(InputError, match=r"zero\.pt do not fit this model: missing start\."):
        load_state(learned, zero.state_dict(), "zero.pt")


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """The command line of a tiny run with a start, in a folder."""
    monkeypatch.setattr("mdeq_vision.command.model_summary", lambda *arguments: "")
    more = ["DEQ.F_START", "learned", "TRAIN.CLIP", "0.1"]

    def get(to, *last):
        return ["--cfg", DIGITS, "--modelDir", tmp_path / to, *TINY_DIGITS, *SMALL, *more, *last]

    return get


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
def test_a_run_with_a_start(argv, tmp_path, stop_at, capsys):
    """It continues bit for bit; its weights are evaluated, and loaded, with the start."""
    assert run_tool("cls_train", *argv("whole")) == 0
    stop_at(5)
    assert run_tool("cls_train", *argv("run")) == 130
    assert run_tool("cls_train", *argv("run", "TRAIN.RESUME", "True")) == 0
    inner = "digits/cls_mdeq_TINY"
    folder = tmp_path / "run" / inner
    assert_same_run(folder, tmp_path / "whole" / inner)
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    moved = [t for name, t in weights.items() if name.startswith(PREFIX)]
    assert moved
    assert all(t.abs().max() > 0 for t in moved)
    loaded = mdeq_vision.load(folder)
    assert loaded.model.start is not None
    capsys.readouterr()
    for start in ("learned", "zero"):
        assert run_tool("cls_valid", *argv("run", "DEQ.F_START", start)) == 0
    assert capsys.readouterr().out.count("top1") == 2


def test_the_start_is_left_out_of_clipping(argv, monkeypatch):
    from mdeq_vision.image_trainer import ImageTrainer

    trainers = []
    monkeypatch.setattr(ImageTrainer, "train", lambda self, *arguments: trainers.append(self))
    assert run_tool("cls_train", *argv("run", "DEBUG.DEBUG", "True")) == 0
    (trainer,) = trainers
    clipped = {id(p) for p in trainer.clipped}
    names = [name for name, p in trainer.model.named_parameters() if id(p) not in clipped]
    assert names == [f"start.{name}" for name, _ in trainer.model.start.named_parameters()]


def test_other_values_are_refused(argv, capsys):
    assert run_tool("cls_train", *argv("run", "DEQ.F_START", "zeros")) == 2
    assert "DEQ.F_START is 'zeros', but must be zero or learned" in capsys.readouterr().err
