"""Spectral norm and weight norm of a whole module, and the contractive layer, with and in a DEQ."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lib import DEQ, ContractiveLayer, InputError, spectral_norm, weight_norm_all
from lib.parametrizations import SpectralNorm

NORMS = {"spectral": spectral_norm, "weight": weight_norm_all}


def norm_of(weight):
    return torch.linalg.matrix_norm(weight.detach(), ord=2)


def linear(size=8, factor=3.0, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(size, size, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(factor)
    return layer


def solve(layer, u, **options):
    deq = DEQ("anderson:eps=1e-10", "gmres:eps=1e-10", **options)
    return deq(lambda z: torch.tanh(layer(z) + u), torch.zeros_like(u), f_thres=200)


def test_norm_is_at_most_the_bound():
    large, small = linear(), linear(factor=0.1)
    before = small.weight.detach().clone()
    torch.testing.assert_close(norm_of(spectral_norm(large).weight).item(), 0.9, rtol=1e-2, atol=0)
    assert torch.equal(spectral_norm(small).weight, before)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), (3, 16)),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 9, 9)),
    "even, in groups": (lambda: nn.Conv2d(4, 6, (2, 4), groups=2), (4, 9, 9)),
    "strided and dilated": (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2), (3, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 6, 6)),
    "3d": (lambda: nn.Conv3d(2, 2, 3, padding=1), (2, 5, 5, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_norm_of_a_convolution_is_that_of_the_operator(kind):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[kind]
    layer = make().double()
    with torch.no_grad():
        layer.weight.mul_(10)
        layer.bias.zero_()
    spectral_norm(layer)

    def image(x):
        return layer(x[None])[0].flatten()

    found = torch.autograd.functional.jacobian(image, torch.zeros(shape).double())
    # At most the bound, up to the power iteration; not needlessly small.
    assert 0.5 < norm_of(found.flatten(1)) < 0.9 * 1.02


@pytest.mark.parametrize("kind", ["2d", "even, in groups", "transposed", "3d"])
def test_adjoint_of_a_convolution(kind):
    """<K v, u> = <v, K'u>."""
    layer = spectral_norm(CONVOLUTIONS[kind][0]().double())
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    u, v = torch.randn_like(norm.left), torch.randn_like(norm.right)
    sides = (norm._image(weight, v) * u).sum(), (norm._adjoint(weight, u) * v).sum()
    torch.testing.assert_close(*sides)


@pytest.mark.parametrize("kind", NORMS)
def test_gradient_in_training_mode_equals_the_dense_one(kind):
    """In training mode, with the buffers of the power iteration free to change."""
    layer = NORMS[kind](linear()).train()
    if kind == "weight":
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(0.3)
    parameters = list(layer.parameters())
    u = torch.randn(4, 8, dtype=torch.float64)
    for _ in range(2):
        found = torch.autograd.grad(solve(layer, u).z.square().sum(), parameters)
        weight, z = layer.weight, solve(layer, u).z_star
        f = torch.tanh(z @ weight.T + u)
        slope = 1 - f.detach().square()
        # y = (I - J)^-T g for each sample, J = diag(slope) W
        jacobian = slope[:, :, None] * weight.detach()
        y = torch.linalg.solve((torch.eye(8) - jacobian).mT, 2 * f.detach())
        expected = torch.autograd.grad(f, parameters, y)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        with torch.no_grad():
            parameters[0].add_(0.1 * found[0])


@pytest.mark.parametrize("kind", NORMS)
def test_a_step_computes_the_weight_twice(kind, monkeypatch):
    layer, count = NORMS[kind](linear(factor=0.5)), 0
    compute = type(layer.parametrizations.weight[0]).compute

    def counted(self, *originals):
        nonlocal count
        count += 1
        return compute(self, *originals)

    monkeypatch.setattr(type(layer.parametrizations.weight[0]), "compute", counted)
    found = solve(layer, torch.randn(4, 8, dtype=torch.float64))
    assert found.solution["nfe"] > 4
    found.z.sum().backward()
    assert count == 2


def test_copies_of_a_module_have_their_own_weight_within_a_solve():
    """torch.nn.utils.parametrize.cached() would give both the weight of the first."""
    first = spectral_norm(linear(), 0.4)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.parametrizations.weight.original.mul_(-1)
    u = torch.randn(4, 8, dtype=torch.float64)
    z = DEQ()(lambda z: torch.tanh(first(z) + second(z) + u), torch.zeros_like(u)).z_star
    torch.testing.assert_close(z, torch.tanh(u))


def test_backward_frees_what_it_used_and_gradients_accumulate():
    layer, u = spectral_norm(linear()), torch.randn(4, 8, dtype=torch.float64)
    weight = layer.parametrizations.weight.original
    solve(layer, u).z.sum().backward()
    once = weight.grad.clone()
    found = solve(layer, u)  # a graph of its own, though the weight is the same
    found.z.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        found.z.sum().backward()


def test_buffers_change_once_per_change_of_the_weight_and_in_training_only():
    layer = spectral_norm(linear())
    norm = layer.parametrizations.weight[0]
    original = layer.parametrizations.weight.original

    def moved(action):
        before = norm.right.clone()
        action()
        return not torch.equal(before, norm.right)

    def change():
        with torch.no_grad():
            original.add_(torch.randn(8, 8, dtype=torch.float64))
        return layer.weight

    assert moved(change)
    assert not moved(lambda: layer.weight)
    layer.eval()
    assert not moved(change)


def test_norm_stays_at_the_bound_in_training():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(32, 32))
    adam = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(50):
        x = torch.randn(16, 32)
        adam.zero_grad()
        (layer(x) - 3 * x).square().mean().backward()
        adam.step()
    assert 0.89 < norm_of(layer.weight) < 0.9 * 1.01


def test_a_zero_weight_is_no_trap():
    layer = linear()
    with torch.no_grad():
        layer.weight.zero_()
    spectral_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(5 * torch.eye(8))
    torch.testing.assert_close(norm_of(layer.weight).item(), 0.9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_state_dict_and_deepcopy(kind):
    layer, other = NORMS[kind](linear()).eval(), NORMS[kind](linear(seed=1)).eval()
    assert not torch.equal(layer.weight, other.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_resumed_training_is_equal_bit_for_bit():
    def steps(layer, count, seed):
        torch.manual_seed(seed)
        sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(count):
            sgd.zero_grad()
            solve(layer, torch.randn(4, 8, dtype=torch.float64)).z.square().sum().backward()
            sgd.step()

    whole, resumed = spectral_norm(linear()), spectral_norm(linear(seed=1))
    steps(whole, 3, seed=0)
    resumed.load_state_dict(whole.state_dict())
    for layer in (whole, resumed):
        steps(layer, 3, seed=1)
    assert torch.equal(whole.weight, resumed.weight)


def test_random_state_stays():
    layer, before = linear(), torch.get_rng_state()
    spectral_norm(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_norm_equals_torch():
    layer = weight_norm_all(nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 3)))
    for part in layer:
        original = nn.Linear(3, 4) if isinstance(part, nn.Linear) else nn.Conv2d(2, 3, 3)
        torchs = parametrizations.weight_norm(original)
        torchs.load_state_dict(part.state_dict())
        torch.testing.assert_close(part.weight, torchs.weight)


def test_weight_norm_counts_dimensions_from_the_end_too():
    layer = weight_norm_all(linear(), dim=-1)
    g = layer.parametrizations.weight.original0
    torch.testing.assert_close(g[0], layer.weight.norm(dim=0))


@pytest.mark.parametrize("kind", NORMS)
def test_whole_module_in_one_call(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4)))
    assert NORMS[kind](model) is model
    names = list(model.state_dict())
    assert sum("parametrizations.weight.original" in name for name in names) in (2, 4)
    assert "1.1.weight" in names


@pytest.mark.parametrize("kind", NORMS)
def test_refusals_are_one_line(kind):
    norm = NORMS[kind]
    with pytest.raises(InputError, match=r"LayerNorm has no Linear or convolution"):
        norm(nn.LayerNorm(3))
    with pytest.raises(InputError, match=r"weight of 1 is parametrised already"):
        norm(nn.Sequential(nn.Linear(3, 3), norm(nn.Linear(3, 3))))
    with pytest.raises(InputError, match=r"not initialised"):
        norm(nn.LazyLinear(3))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf")])
def test_bound_must_be_positive(bound):
    with pytest.raises(InputError, match="bound"):
        spectral_norm(nn.Linear(3, 3), bound)
    with pytest.raises(InputError, match="bound"):
        ContractiveLayer(3, 3, bound)


def test_contractive_layer_contracts():
    torch.manual_seed(0)
    layer = ContractiveLayer(5, 16, bound=0.7).double()
    u = layer.inject(torch.randn(4, 5, dtype=torch.float64))
    a, b = torch.randn(2, 4, 16, dtype=torch.float64)
    shrinks = (layer(a, u) - layer(b, u)).norm(dim=1) / (a - b).norm(dim=1)
    assert shrinks.max() < 0.71
    assert isinstance(layer.mix.parametrizations.weight[0], SpectralNorm)
    with pytest.raises(InputError, match="between 0 and 1"):
        ContractiveLayer(5, 16, bound=1.0)
