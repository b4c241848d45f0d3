"""Batch norm over two processes against one process with the whole batch.

The two processes run this file as a script; they go through all cases and leave what they found.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from groups import run_group, work
from lib.errors import InputError
from lib.runs.processes import Processes
from mdeq_vision.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm

# Options of the layer, samples per process, and the dtype. The tolerance of the last is bfloat16's.
CASES = {
    "even": ({}, (2, 2), torch.float64),
    "uneven": ({}, (3, 1), torch.float64),
    "one process without samples": ({}, (4, 0), torch.float64),
    "no affine": ({"affine": False}, (3, 1), torch.float64),
    "cumulative": ({"momentum": None}, (3, 1), torch.float64),
    "momentum 0.01": ({"momentum": 0.01, "eps": 1e-3}, (2, 2), torch.float64),
    "no running": ({"track_running_stats": False}, (3, 1), torch.float64),
    "float32": ({}, (3, 1), torch.float32),
    "bfloat16": ({}, (2, 2), torch.bfloat16),
}
CHANNELS, STEPS = 3, 3
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def layer(options, cls=nn.BatchNorm2d):
    torch.manual_seed(0)
    norm = cls(CHANNELS, **options).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def batches(n, dtype):
    """Inputs, and gradients of outputs, of several steps; the mean is far from zero."""
    torch.manual_seed(1)
    x = 3 + 10 * torch.rand(STEPS, 1, CHANNELS, 1, 1) + torch.randn(STEPS, n, CHANNELS, 4, 5)
    return x.to(dtype), torch.randn(STEPS, n, CHANNELS, 4, 5).to(dtype)


def run_layer(norm, inputs, grads):
    """Some steps in training and one in evaluation: all outputs, gradients and buffers."""
    outputs, input_grads = [], []
    for x, grad in zip(inputs, grads, strict=True):
        x = x.clone().requires_grad_()
        y = norm.train()(x)
        y.backward(grad)  # parameters' gradients add up
        outputs.append(y.detach())
        input_grads.append(x.grad)
    outputs.append(norm.eval()(inputs[0]).detach() if norm.track_running_stats else y.detach())
    return {
        "outputs": outputs,
        "input_grads": input_grads,
        "parameter_grads": [p.grad for p in norm.parameters()],
        "state": norm.state_dict(),
    }


def network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    ).double()


def train(model, x, target):
    """A few steps of a loss that is the mean over the batch: the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).tanh(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def training_batch():
    torch.manual_seed(3)
    return torch.randn(4, 2, 6, 5).double(), torch.randn(4, 3, 4, 3).double()


# ---- what a process does ---------------------------------------------------------------------


def found_by(processes: Processes) -> dict:
    found, rank = {}, processes.rank
    for name, (options, sizes, dtype) in CASES.items():
        inputs, grads = batches(sum(sizes), dtype)
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        norm = layer(options, SyncBatchNorm2d).to(dtype)
        found[name] = run_layer(norm, inputs[:, mine], grads[:, mine])

    model = convert_sync_batchnorm(network())
    x, target = training_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    losses = train(DistributedDataParallel(model), x[mine], target[mine])
    found["ddp"] = {"losses": losses, "state": model.state_dict()}

    found["errors"] = []
    for shape in ((1 - rank, CHANNELS, 1, 1), (0, CHANNELS, 4, 4)):
        try:
            SyncBatchNorm2d(CHANNELS)(torch.zeros(shape))
        except InputError as error:
            found["errors"].append(str(error))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory, server):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("processes") / "found"
    return run_group(__file__, 2, folder, server=server, timeout=120)


# ---- two processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_whole_batch(found, case):
    options, sizes, dtype = CASES[case]
    inputs, grads = batches(sum(sizes), dtype)
    # The reference computes the same numbers in float64.
    norm = layer(options).to(dtype).double()
    expected = run_layer(norm, inputs.double(), grads.double())
    first, second = (results[case] for results in found)
    tolerance = TOLERANCES[dtype]

    def close(found, expected):
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, check_dtype=False
        )

    for name in ("outputs", "input_grads"):
        shares = [torch.cat(pair) for pair in zip(first[name], second[name], strict=True)]
        for share, whole in zip(shares[:STEPS], expected[name], strict=False):
            assert share.dtype == dtype
            close(share, whole)
    if norm.track_running_stats:  # evaluation; it sees the process's own batch alone
        close(torch.cat([first["outputs"][-1], second["outputs"][-1]]), expected["outputs"][-1])
    # DistributedDataParallel averages what it gets; the whole gradient is the sum.
    pairs = zip(first["parameter_grads"], second["parameter_grads"], strict=True)
    for pair, whole in zip(pairs, expected["parameter_grads"], strict=True):
        close(sum(pair).double(), whole)
    assert first["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        close(first["state"][key], value)
        assert torch.equal(first["state"][key], second["state"][key])


def test_ddp_training_is_that_of_one_process_with_the_doubled_batch(found):
    model = network()
    losses = train(model, *training_batch())
    first, second = (results["ddp"] for results in found)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=1e-10)
    for results in (first, second):
        torch.testing.assert_close(
            results["state"], dict(model.state_dict()), rtol=1e-10, atol=1e-10
        )


def test_too_few_values_are_refused_by_all_processes(found):
    for results in found:
        assert [error.split(":")[0].rsplit(" ", 1)[1] for error in results["errors"]] == ["1", "0"]


# ---- one process -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
def test_one_process_is_plain_batch_norm(options):
    inputs, grads = batches(4, torch.float64)
    expected = run_layer(layer(options), inputs, grads)
    results = run_layer(layer(options, SyncBatchNorm2d), inputs, grads)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


# ---- conversion ------------------------------------------------------------------------------


def test_conversion_keeps_everything_else():
    model = nn.ModuleDict({"net": network(), "head": nn.Sequential(nn.BatchNorm2d(3, eps=1e-3))})
    model["net"][1].momentum = 0.01
    model["net"][4].eval()
    model["net"][4].weight.requires_grad_(False)
    model["again"] = model["net"][1]  # one layer in two places
    before = copy.deepcopy(model)
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert convert_sync_batchnorm(model) is model
    assert [type(m) for m in model["net"]][1::3] == [SyncBatchNorm2d] * 2
    assert type(model["head"][0]) is SyncBatchNorm2d
    assert model["again"] is model["net"][1]
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == tensors
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert new.training == old.training
        if isinstance(old, nn.BatchNorm2d):
            for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
                assert getattr(new, name) == getattr(old, name)
    assert not model["net"][4].weight.requires_grad


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_conversion_of_a_layer_itself(options):
    norm = nn.BatchNorm2d(3, **options)
    sync = convert_sync_batchnorm(norm)
    assert type(sync) is SyncBatchNorm2d
    assert sync.state_dict().keys() == norm.state_dict().keys()
    assert convert_sync_batchnorm(sync) is sync
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(sync(x), norm(x))


def test_conversion_on_the_meta_device():
    with torch.device("meta"):
        model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert model[0].weight.is_meta


def test_conversion_refuses_other_dimensions():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="layer '1' is a BatchNorm1d"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.gpu
def test_conversion_on_a_gpu():
    assert isinstance(convert_sync_batchnorm(network().cuda())[1], nn.SyncBatchNorm)


if __name__ == "__main__":
    work(found_by, sys.argv[1:])
