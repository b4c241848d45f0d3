"""What a process makes of the others; shares of a batch, and DataParallel as far as a CPU tells."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lib.distributed import (
    TIMEOUT,
    BalancedDataParallel,
    Processes,
    _timeout,
    end_at_once,
    lost_contact,
    shares,
)
from lib.errors import InputError

# ---- several processes -------------------------------------------------------------------------

_GLOO = "[/a/b/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # Of torch 2.13, from tests/scale.
        (
            RuntimeError(
                f"{_GLOO}pair.cc:537] Read error [10.77.0.2]:83: Connection reset by peer. This is "
                "typically caused by a remote worker hanging or bugs in the application. Check ..."
            ),
            "Read error [10.77.0.2]:83: Connection reset by peer",
        ),
        (
            RuntimeError(f"{_GLOO}unbound_buffer.cc:78] Timed out waiting 6000ms for recv"),
            "Timed out waiting 6000ms for recv",
        ),
        (dist.DistNetworkError("failed to recv\nException raised from"), "failed to recv"),
        (dist.DistStoreError(""), "DistStoreError"),
        (RuntimeError("shape '[2]' is invalid"), ""),
        (ValueError("gloo"), ""),
    ],
)
def test_lost_contact(error, said):
    assert lost_contact(error) == said


@pytest.mark.parametrize(("text", "minutes"), [(None, 15), ("0.5", 0.5), ("10000", 10_000)])
def test_timeout(monkeypatch, text, minutes):
    monkeypatch.delenv(TIMEOUT, raising=False)
    if text is not None:
        monkeypatch.setenv(TIMEOUT, text)
    assert _timeout() == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e9", "ten"])
def test_bad_timeout(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(InputError, match=f"{TIMEOUT} is '{text}', but must be a number"):
        _timeout()


def test_alone():
    """A single process has no group, leads itself, and is never ended behind its back."""
    with Processes.joined() as processes:
        assert processes == Processes()
        assert processes.lead_keeps(lambda: 3) == 3
        end_at_once(1)


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


@pytest.mark.parametrize("first", [-1, 0, 1, 4])
def test_the_whole_way_with_stand_in_devices(parallel, first, monkeypatch):
    """Replicas on the CPU: outputs, their means, and gradients are the whole batch's."""
    used = []

    def parallel_apply(replicas, inputs, kwargs, devices):
        used.append([len(data.t()) for data, *_ in inputs])
        assert len(devices) == len(replicas)
        return [r(*i, **k) for r, i, k in zip(replicas, inputs, kwargs, strict=True)]

    def replicate(module, devices, detach):
        assert not detach
        return [module] * len(devices)

    parallel.first, parallel.device_ids, parallel.output_device = first, ["cpu"] * 3, "cpu"
    monkeypatch.setattr("lib.distributed.replicate", replicate)
    monkeypatch.setattr("lib.distributed.parallel_apply", parallel_apply)
    monkeypatch.setattr("lib.distributed.gather", lambda parts, device, dim: torch.cat(parts, dim))
    data, target, mems = torch.randn(2, 6), torch.randn(2, 6), [torch.randn(5, 6)]
    found = parallel(data, target, mems, shift=1.0)
    expected = parallel.module(data, target, mems, shift=1.0)
    assert used == [[size for size in shares(6, 3, first) if size]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(found[:2], expected[:2], strict=True):
        grads = [
            torch.autograd.grad(x.sum(), parallel.module.scale, retain_graph=True) for x in (a, b)
        ]
        torch.testing.assert_close(*grads)
