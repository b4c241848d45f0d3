"""Shares of a batch, and DataParallel on pretended GPUs."""

import pytest
import torch
from torch import nn

from lib.data_parallel import BalancedDataParallel, shares
from lib.errors import InputError
from pretended_machine import pretended_machine

# ---- shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "devices", "first", "expected"),
    [
        (56, 4, 14, [14, 14, 14, 14]),  # the published runs
        (56, 4, -1, [14, 14, 14, 14]),
        (10, 4, 1, [1, 3, 3, 3]),
        (10, 3, -1, [4, 3, 3]),
        (11, 4, 1, [1, 4, 3, 3]),
        (10, 4, 0, [0, 4, 3, 3]),
        (10, 4, 10, [10, 0, 0, 0]),
        (2, 4, -1, [1, 1, 0, 0]),
        (7, 1, 3, [7]),
        (7, 1, -1, [7]),
    ],
)
def test_shares(batch, devices, first, expected):
    assert shares(batch, devices, first) == expected


@pytest.mark.parametrize("first", [-1, 0, 1, 3])
def test_shares_make_up_the_batch(first):
    for batch in range(3, 30):
        for devices in range(1, 9):
            found = shares(batch, devices, first)
            assert len(found) == devices
            assert sum(found) == batch
            rest = found[1:] if first >= 0 else found
            assert not rest or max(rest) - min(rest) <= 1


def test_first_share_above_the_batch():
    with pytest.raises(InputError, match="9 exceeds the batch of 8"):
        shares(8, 2, 9)


# ---- splitting -------------------------------------------------------------------------------


class Model(nn.Module):
    """Takes what the language model takes: data, target, mems, and options by keyword."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, data, target, mems, shift=0.0):
        memory = mems[0].sum(0) if mems else 0.0
        scaled = data * self.scale + shift + memory
        return [scaled, scaled.square().mean().view(1, 1), data.t()]


@pytest.fixture
def parallel():
    model = BalancedDataParallel(Model(), 1, 1, output_dims=(1, None, 0))
    model.dim = 1  # PyTorch's own constructor stops before this where there is no GPU
    return model


def test_split_along_the_batch(parallel):
    data = torch.arange(12.0).view(2, 6)
    parts = parallel._split(data, ["cpu", "cpu"], [2, 4])
    assert [part.shape for part in parts] == [(2, 2), (2, 4)]
    assert torch.equal(torch.cat(parts, 1), data)


def test_split_of_memory(parallel):
    mems = [torch.randn(5, 6, 3), torch.randn(5, 6, 9)]
    parts = parallel._split(mems, ["cpu"] * 3, [1, 2, 3])
    assert len(parts) == 3
    for part, size in zip(parts, (1, 2, 3), strict=True):
        assert [m.shape for m in part] == [(5, size, 3), (5, size, 9)]
    for i, whole in enumerate(mems):
        assert torch.equal(torch.cat([part[i] for part in parts], 1), whole)


def test_split_of_an_empty_memory(parallel):
    assert parallel._split([], ["cpu", "cpu"], [1, 2]) == [[], []]
    empty = [torch.zeros(0, 6, 3), torch.zeros(0, 6, 9)]
    parts = parallel._split(empty, ["cpu", "cpu"], [2, 4])
    assert [[tuple(m.shape) for m in part] for part in parts] == [
        [(0, 2, 3), (0, 2, 9)],
        [(0, 4, 3), (0, 4, 9)],
    ]


def test_other_values_go_to_every_device(parallel):
    assert parallel._split(None, ["cpu", "cpu"], [1, 1]) == [None, None]
    assert parallel._split(3, ["cpu", "cpu"], [1, 1]) == [3, 3]


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are GPUs to share between")
def test_one_device_or_none_is_the_model_itself(parallel):
    data, target = torch.randn(2, 6), torch.randn(2, 6)
    mems = [torch.randn(5, 6)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parallel.to(device)
    data, target, mems = data.to(device), target.to(device), [m.to(device) for m in mems]
    found = parallel(data, target, mems, shift=1.0)
    expected = parallel.module(data, target, mems, shift=1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found[0].sum().backward()
    assert parallel.module.scale.grad is not None


# ---- replicas, by PyTorch's own functions, on pretended GPUs -----------------------------------


def whole(device):
    torch.manual_seed(0)
    data, target, memory = torch.randn(2, 6), torch.randn(2, 6), torch.randn(5, 6)
    return data.to(device), target.to(device), [memory.to(device)]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("first", [-1, 0, 1, 4, 6])
def test_outputs_and_gradients_are_the_whole_batchs(first, n):
    """Also where the first device, which holds the model, takes no sample of its own."""
    reference = Model()
    expected = reference(*whole("cpu"), shift=1.0)
    with pretended_machine(n):
        model = Model().to("cuda:0")
        used = []
        model.register_forward_hook(
            lambda _, inputs, outputs: used.append((inputs[0].get_device(), inputs[0].shape[1]))
        )
        parallel = BalancedDataParallel(model, first, 1, output_dims=(1, None, 0))
        found = parallel(*whole("cuda:0"), shift=1.0)
        assert sorted(used) == [(i, size) for i, size in enumerate(shares(6, n, first)) if size]
        for a, b in zip(found, expected, strict=True):
            assert a.device == torch.device("cuda:0")
            torch.testing.assert_close(a.detach().cpu(), b.detach())
        for a, b in zip(found[:2], expected[:2], strict=True):
            model.scale.grad = None
            a.sum().backward(retain_graph=True)
            (of_whole,) = torch.autograd.grad(b.sum(), reference.scale, retain_graph=True)
            torch.testing.assert_close(model.scale.grad.cpu(), of_whole)


def test_no_gradient_no_graph():
    with pretended_machine(2), torch.no_grad():
        parallel = BalancedDataParallel(Model().to("cuda:0"), 0, 1, output_dims=(1, None, 0))
        assert not any(out.requires_grad for out in parallel(*whole("cuda:0")))


class Formats(nn.Module):
    """Tells, as numbers, in which format it multiplies and whether autocast is on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x):
        product = x @ self.weight
        bits = float(torch.finfo(product.dtype).bits)
        eps, on = torch.finfo(product.dtype).eps, float(torch.is_autocast_enabled("cuda"))
        return [x.new_full((len(x), 3), 0.0) + torch.tensor([bits, eps, on]).to(x.device)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_replicas_compute_in_the_callers_format(dtype):
    """In its threads, PyTorch's parallel_apply alone computes in float16, whatever is asked."""
    with pretended_machine(3):
        parallel = BalancedDataParallel(Formats().to("cuda:0"), 0, 0, output_dims=(0,))
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            (found,) = parallel(torch.ones(4, 3).to("cuda:0"))
        info = torch.finfo(dtype or torch.float32)
        assert found.cpu().tolist() == [[info.bits, pytest.approx(info.eps), dtype is not None]] * 4
