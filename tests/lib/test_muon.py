"""Muon for matrices, AdamW for other parameters."""

import copy

import pytest
import torch
from torch import nn

from lib.runs.muon import Muon, orthogonal
from lib.runs.optimizers import restore_optimizer

LR, DECAY = 0.02, 0.1


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonal(u @ torch.diag(torch.logspace(0, -1, min(shape))) @ v)
    values = u.t() @ found @ v.t()
    levels = values.diagonal()
    torch.testing.assert_close(values, torch.diag(levels), rtol=0, atol=1e-4)
    assert levels.min() > 0.6
    assert levels.max() < 1.25


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def train(optimizer, parameters, steps=4):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare")
def test_it_is_the_muon_of_torch_up_to_bfloat16():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20, 6))]
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    train(Muon(ours, matrices=ours, lr=LR, weight_decay=DECAY), ours)
    train(
        torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"), theirs
    )
    for a, b, z in zip(ours, theirs, start, strict=True):
        assert torch.linalg.norm(a - b) < 0.02 * torch.linalg.norm(a - z)


def test_other_parameters_are_those_of_adamw_bit_for_bit():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))
    twin = copy.deepcopy(vector)
    train(Muon([matrix, vector], matrices=[matrix], lr=LR, weight_decay=DECAY), [matrix, vector])
    other = nn.Parameter(torch.zeros(4, 5))
    train(torch.optim.AdamW([other, twin], lr=LR, weight_decay=DECAY), [other, twin])
    assert torch.equal(vector, twin)
    assert matrix.grad is not None  # the gradients are left for who reads them after the step


def test_a_kernel_counts_as_one_matrix():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1))
    generator = torch.Generator().manual_seed(1)
    kernel.grad = torch.randn(kernel.shape, generator=generator)
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):
        Muon([p], matrices=[p], lr=LR, weight_decay=DECAY).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_what_has_no_gradient_stays():
    matrix = nn.Parameter(torch.randn(4, 5))
    before = matrix.detach().clone()
    Muon([matrix], matrices=[matrix], lr=LR, weight_decay=DECAY).step()
    assert torch.equal(matrix, before)


def test_it_goes_on_from_a_saved_state_bit_for_bit():
    torch.manual_seed(0)
    one = [nn.Parameter(torch.randn(4, 5, 1)), nn.Parameter(torch.randn(5))]
    first = Muon(one, matrices=one[:1], lr=LR, weight_decay=DECAY)
    train(first, one)
    two = copy.deepcopy(one)
    second = Muon(two, matrices=two[:1], lr=LR, weight_decay=DECAY)
    restore_optimizer(second, copy.deepcopy(first.state_dict()))
    train(first, one)
    train(second, two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
