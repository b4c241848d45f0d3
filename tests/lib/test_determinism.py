"""The switch for repeatable kernels: what it sets, and, on a GPU, that a step then repeats."""

import os

import pytest
import torch
from torch import nn

from lib.deq import DEQ
from lib.runs.determinism import CUBLAS, deterministic


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    monkeypatch.setenv(CUBLAS, "")  # so that it is put back
    monkeypatch.delenv(CUBLAS)
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory
    yield
    cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def test_it_switches_everything(monkeypatch):
    torch.backends.cudnn.benchmark = True
    deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[CUBLAS] == ":4096:8"
    monkeypatch.setenv(CUBLAS, ":16:8")  # what a user chose stays
    deterministic(True)
    assert os.environ[CUBLAS] == ":16:8"
    deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_without_it_cudnn_may_measure():
    torch.backends.cudnn.benchmark = True
    deterministic(False)
    assert torch.backends.cudnn.benchmark
    assert CUBLAS not in os.environ


def gradients(device) -> list[torch.Tensor]:
    """Of embedding, convolution, interpolation, index_add and an equilibrium."""
    torch.manual_seed(0)
    table, conv = nn.Embedding(9, 64).to(device), nn.Conv2d(4, 4, 3, padding=1).to(device)
    ids = torch.arange(4096).remainder(9).to(device)
    x = table(ids).view(16, 4, 64, 64)
    z = DEQ("broyden", "broyden")(
        lambda z: torch.tanh(0.1 * conv(z) + x), torch.zeros_like(x), f_thres=8, b_thres=8
    ).z
    large = nn.functional.interpolate(z, scale_factor=2, mode="bilinear", align_corners=True)
    sums = torch.zeros(5, device=device).index_add(
        0, torch.arange(16, device=device) % 5, large.square().mean((1, 2, 3))
    )
    sums.sum().backward()
    return [z.detach(), table.weight.grad, conv.weight.grad]


@pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_repeats_bit_for_bit(device):
    """And no operation of it lacks a kernel of that kind."""
    deterministic(True)
    first = gradients(device)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(device), first, strict=True))
