"""What trainers share: exit codes, random states, statistics, refusal of what is not finite."""

import random
import warnings

import pytest
import torch
from torch import nn

from lib.deq import DEQ
from lib.errors import DEQWarning, InputError
from lib.runs.command_line import exit_code
from lib.runs.determinism import random_states, restore_random_states
from lib.runs.evaluation_loop import evaluating
from lib.runs.figures import restore_stats, solver_figures, stats_state
from lib.runs.interrupts import Stopped, TrainingError
from lib.runs.optimizers import fused_if_possible
from lib.runs.run_folder import warnings_in
from pretended_machine import pretended_machine


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.deq = DEQ("anderson")

    def forward(self, x):
        return self.deq(lambda z: torch.tanh(self.weight * z + x), torch.zeros_like(x)).z


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (InputError("bad\n  thing"), 2, "tool: bad thing\n"),
        (TrainingError("the loss is nan"), 1, "tool: the loss is nan\n"),
        (PermissionError(13, "Permission denied", "x.pt"), 2, "'x.pt'"),
        (
            Stopped("stopped by SIGTERM at step 7", 143),
            143,
            "tool: stopped by SIGTERM at step 7\n",
        ),
        (RuntimeError("[gloo] Connection closed by peer\n x"), 1, "tool: lost the other processes"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (MemoryError(), 1, "tool: out of memory: take a smaller model or batch\n"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            ),
            1,
            "tool: out of memory (9 bytes more were needed): take",
        ),
    ],
)
def test_exit_code(error, code, words, capsys):
    def action():
        if error is not None:
            raise error

    assert exit_code("tool", action) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == (code != 0)


def test_exit_code_leaves_our_own_mistakes_alone():
    with pytest.raises(ZeroDivisionError):
        exit_code("tool", lambda: 1 / 0)


def test_random_states_go_on_where_they_were():
    rng = random.Random(3)
    state = random_states(rng, [])
    first = [rng.random(), torch.rand(2).tolist()]
    assert restore_random_states(state, rng, []) == []
    assert [rng.random(), torch.rand(2).tolist()] == first


@pytest.mark.parametrize(
    ("before", "here", "said"),
    [
        ([0, 1], [0, 1], ""),
        ([1], [0], ""),  # a process computes on another GPU of the same machine
        ([0, 1, 2], [0], "1 GPU(s) continue(s) what 3 GPU(s) began"),
        ([0], [0, 1], "2 GPU(s) continue(s) what 1 GPU(s) began"),
        ([0], [], "the CPU continue(s) what 1 GPU(s) began"),
        ([], [0], "1 GPU(s) continue(s) what the CPU began"),
    ],
)
def test_random_states_of_other_gpus(before, here, said):
    """Saved on a machine with enough GPUs, restored on one that may have fewer."""
    rng = random.Random(3)
    with pretended_machine(max([*before, 0]) + 1):
        state = random_states(rng, before)
    with pretended_machine(max([*here, 0]) + 1):
        for gpu in here:
            torch.cuda.set_rng_state(torch.Generator().manual_seed(9).get_state(), gpu)
        lines = restore_random_states(state, rng, here)
        for gpu, saved in zip(here, state["cuda_random"], strict=False):
            assert torch.equal(torch.cuda.get_rng_state(gpu), saved)
    assert len(lines) == bool(said)
    assert said in "".join(lines)
    assert ("not bit for bit" in "".join(lines)) == bool(said)


def test_evaluating_puts_everything_back():
    model, x = Model(), torch.ones(2, 1)
    model(x).sum().backward()
    before = stats_state(model.deq.stats)

    def fail():
        with evaluating(model) as stats:
            assert not model.training
            assert not model(x).requires_grad
            assert stats.forward.solves == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.training
    assert torch.is_grad_enabled()
    assert stats_state(model.deq.stats) == before


def test_solver_figures_and_their_state():
    model = Model()
    assert solver_figures(model.deq.stats) == ({}, "")
    model(torch.ones(2, 1)).sum().backward()
    values, text = solver_figures(model.deq.stats)
    assert values["forward_nfe"] == model.deq.stats.forward.nfe > 0
    assert values["backward_rel_residual"] < 1e-3
    assert f"f res {values['forward_rel_residual']:.2e}" in text
    assert "| b res" in text
    assert "broken" not in text
    other = Model()
    restore_stats(stats_state(model.deq.stats), other.deq.stats)
    assert solver_figures(other.deq.stats) == (values, text)


# ---- optimisers ------------------------------------------------------------------------------


class Views(nn.Module):
    """Parameters over one storage: two parts of it side by side, and two that are the same."""

    def __init__(self):
        super().__init__()
        numbers = torch.arange(6.0)
        self.left, self.right = nn.Parameter(numbers[:3]), nn.Parameter(numbers[3:])
        self.again, self.alone = nn.Parameter(numbers[:3]), nn.Parameter(torch.ones(2))
        self.third = nn.Parameter(numbers[:3])


def test_no_group_has_the_same_numbers_twice():
    """One kernel for all parameters of a group would lose one of two updates."""
    model = Views()
    groups = fused_if_possible(torch.optim.SGD, model, lr=1.0).param_groups
    found = [{id(p) for p in group["params"]} for group in groups]
    expected = [(model.left, model.right, model.alone), (model.again,), (model.third,)]
    assert found == [{id(p) for p in group} for group in expected]
    (only,) = fused_if_possible(torch.optim.SGD, Model(), lr=1.0).param_groups
    assert len(only["params"]) == 1


def test_every_update_of_the_same_numbers_counts():
    model = Views()
    optimizer = fused_if_possible(torch.optim.SGD, model, lr=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert model.left.tolist() == [-3.0, -2.0, -1.0]  # by left, again and third
    assert model.right.tolist() == [2.0, 3.0, 4.0]
    assert model.third.tolist() == model.left.tolist()


def test_warnings_of_solves_are_lines_of_the_log():
    """The same words once; what the log's figures say is left out; other warnings stay."""
    lines = []
    with pytest.warns(UserWarning, match="of another kind"), warnings_in(lines.append):  # noqa: PT031
        for words in ("the adjoint is poor", "the adjoint is poor", "a forward solve stopped"):
            warnings.warn(words, DEQWarning, stacklevel=1)
        warnings.warn("of another kind", UserWarning, stacklevel=1)
    assert lines == ["warning: the adjoint is poor"]
