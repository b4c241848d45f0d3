"""The pretended GPU itself: what it refuses, what it counts, and that autograd works through it."""

import numpy as np
import pytest
import torch
from torch import nn

from pretended_gpu import PretendedGpu

HERE = "tests/test_pretended_gpu.py"


@pytest.fixture
def gpu():
    with PretendedGpu() as gpu:
        yield gpu


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) * x,
        lambda x: torch.ones(3) @ x,
        lambda x: torch.stack([x, torch.ones(3)]),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),  # no number of a formula
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: torch.linalg.vector_norm(x, out=torch.zeros(())),
        lambda x: x + x.to("cuda:1"),
        lambda x: x.clone().add_(torch.ones(3)),
    ],
)
def test_devices_do_not_mix(gpu, operation):
    with pytest.raises(RuntimeError, match="on the same device"):
        operation(torch.ones(3, device="cuda"))


def test_refusals(gpu):
    x, generator = torch.ones(3, device="cuda"), torch.Generator()
    for draw in (
        lambda: torch.randn(3, device="cuda", generator=generator),
        lambda: x.uniform_(generator=generator),
    ):
        with pytest.raises(RuntimeError, match="generator"):
            draw()
    for convert in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="cpu\\(\\) first"):
            convert()


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        ("read", lambda x: x.sum().item()),
        ("read", lambda x: x.tolist()),
        ("read", lambda x: bool(x.sum() > 0)),
        ("read", lambda x: float(x.sum())),
        ("read", lambda x: x.cpu()),
        ("read", lambda x: torch.zeros(3).copy_(x)),
        ("read", lambda x: x.nonzero()),
        ("read", lambda x: x[x > 0]),
        ("read", lambda x: torch.equal(x, x)),
        ("read", lambda x: f"{x.sum():.2f}"),
        ("upload", lambda x: torch.ones(3).to("cuda")),
        ("upload", lambda x: torch.tensor([1.0], device="cuda")),
        ("upload", lambda x: x.new_tensor([1.0])),
        ("upload", lambda x: x.copy_(torch.ones(3))),
        ("", lambda x: torch.ones(3).to("cuda", non_blocking=True)),
        ("", lambda x: torch.where(x > 0, x, 0.0).norm()),
        ("", lambda x: x.double().to(x.device)),
    ],
)
def test_waits_are_counted(gpu, kind, wait):
    x = torch.ones(3, device="cuda")
    wait(x)
    assert sum(gpu.waits.values()) == bool(kind)
    assert gpu.count(kind, HERE) == bool(kind)


def test_places(gpu):
    x = torch.ones(3, device="cuda")
    for _ in range(3):
        x.sum().item()
    x.sum().item()
    counts = {place: n for (_, place), n in gpu.waits.items()}
    first = test_places.__code__.co_firstlineno
    assert counts == {f"{HERE}:{first + 3}": 3, f"{HERE}:{first + 4}": 1}


def test_autograd_goes_through(gpu):
    """A model, hooks, second derivatives, and a loss on the CPU: gradients are the CPU's."""

    def run(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()).to(device)
        shared = model[0].weight
        x = torch.ones(2, 3).to(device).requires_grad_()
        y = model(x)
        y.register_hook(lambda g: 2 * g)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        first.square().sum().to("cpu").backward()
        assert model[0].weight is shared
        return [x.grad, *(p.grad for p in model.parameters())]

    for expected, found in zip(run("cpu"), run("cuda"), strict=True):
        assert found.is_cuda
        assert torch.equal(found.cpu(), expected)


def test_outside_it_nothing_is_left():
    with PretendedGpu():
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda" if not torch.cuda.is_available() else "cuda:99")
    assert not torch.__future__.get_swap_module_params_on_conversion()
