"""Checkpoints of the right form with wrong content are refused before use, or do no harm."""

import copy
from pathlib import Path

import pytest
import torch

from harness import differences
from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.run_folder import Run
from toy_trainer import ToyTrainer
from wrong_contents import ALLOWED, changes, judge

SOURCE = Path("checkpoint.pt")
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


@pytest.fixture(scope="module")
def saved():
    """What a trainer saves after five steps of eight."""
    trainer = ToyTrainer()
    trainer.last_step = 5
    trainer.train(Run.silent())
    return copy.deepcopy(trainer.state_dict())


def end_of(content):
    """The state at the end of the run that goes on from ``content``."""
    trainer = ToyTrainer()
    trainer.load_state_dict(content, SOURCE)
    trainer.train(Run.silent())
    return copy.deepcopy(trainer.state_dict())


def same(a, b):
    return not list(differences(a, b))


def test_changed_checkpoints(saved, tmp_path):
    """A few of what fuzz_files.py tries."""
    path = tmp_path / "checkpoint.pt"
    torch.save(saved, path)
    expected = end_of(load(path))
    for change in changes(saved, count=20, seed=0):
        outcome = judge(path, change, end_of, expected, same)
        assert outcome in ALLOWED, f"{change.place}, {change.kind}: {outcome}"


def refusal(content):
    with pytest.raises(InputError) as caught:
        ToyTrainer().load_state_dict(content, SOURCE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[:2], "is a tensor (2,) of torch.float32, and this run has a tensor (3,) of"),
        (lambda m: m.double(), "is a tensor (3,) of torch.float64, and this run has"),
        (lambda m: m.new_ones(1).expand(10**12), "is a tensor (1000000000000,) of"),
        (lambda m: m * float("nan"), "holds NaN"),
        (lambda m: "text", "is of type str, and this run has a tensor (3,)"),
    ],
    ids=["shape", "dtype", "huge", "nan", "text"],
)
def test_momentum_that_does_not_fit(saved, change, words):
    """A fused optimiser would write outside of its memory."""
    content = copy.deepcopy(saved)
    last = max(content["optimizer"]["state"])
    momentum = content["optimizer"]["state"][last]
    momentum["momentum_buffer"] = change(momentum["momentum_buffer"])
    message = refusal(content)
    assert message.startswith(f"{SOURCE}: optimizer state {last}['momentum_buffer'] ")
    assert words in message


def test_momentum_with_other_strides_is_copied(saved):
    """A fused kernel walks through memory; equal numbers must not share it."""
    content = copy.deepcopy(saved)
    expected = end_of(copy.deepcopy(saved))
    for state in content["optimizer"]["state"].values():
        momentum = state["momentum_buffer"]
        state["momentum_buffer"] = torch.stack([momentum, momentum], dim=-1)[..., 0]
    assert same(end_of(content), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_weights_of_another_dtype(saved, dtype):
    content = copy.deepcopy(saved)
    content["model"]["weight"] = content["model"]["weight"].to(dtype)
    assert f"weight has dtype {dtype} instead of torch.float32" in refusal(content)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("random", 1), (2**32,) + (0,) * 623 + (624,)),
        (("random", 1), (0,) * 624 + (625,)),
        (("random", 2), "text"),
        (("torch_random",), torch.zeros(5056, dtype=torch.uint8)),
        (("torch_random",), torch.zeros(16, dtype=torch.uint8)),
        (("cuda_random",), None),
    ],
)
def test_random_states_that_no_generator_has(saved, place, value):
    content = copy.deepcopy(saved)
    (state,) = content["random_states"]
    if len(place) == 1:
        state[place[0]] = value
    else:
        parts = list(state["random"])
        parts[place[1]] = value
        state["random"] = tuple(parts)
    assert "checkpoint.pt: random_states[0]" in refusal(content)
