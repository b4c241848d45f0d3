"""The warning about a spectral radius above one in training."""

import warnings

import pytest
import torch

from lib import DEQ, ContractiveLayer, DEQWarning
from lib.gradients import adjoint
from lib.gradients.adjoint import growth
from lib.runs.run_folder import warnings_in


def steps(deq, eigenvalue, count, batch=3):
    """Backward passes through z = A z + u, A a rotation times the eigenvalue; the gradients."""
    matrix = eigenvalue * torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    found = []
    for _ in range(count):
        u = torch.ones(batch, 2, requires_grad=True)
        z = deq(lambda z, u=u: z @ matrix + u, torch.zeros(batch, 2)).z
        z.square().sum().backward()
        found.append(u.grad)
    return torch.stack(found)


def radius_warnings(caught):
    return [str(w.message) for w in caught if "spectral radius" in str(w.message)]


@pytest.mark.parametrize("eigenvalue", [0.5, 0.95, 1.4])
def test_growth_of_a_complex_pair(eigenvalue):
    matrix = eigenvalue * torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    found = growth(lambda v: v @ matrix, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert abs(found - eigenvalue) < 1e-5


def test_growth_of_zeros():
    assert growth(torch.zeros_like, torch.ones(2, 3)) < 1e-30
    assert growth(torch.clone, torch.zeros(2, 3)) < 1e-30


@pytest.mark.parametrize(("eigenvalue", "said"), [(1.4, 1), (0.9, 0)])
def test_warning_comes_once_and_names_radius_and_remedy(eigenvalue, said):
    deq = DEQ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(deq, eigenvalue, 99)
        assert radius_warnings(caught) == []
        steps(deq, eigenvalue, 101)
    found = radius_warnings(caught)
    assert len(found) == said
    for message in found:
        assert "1.40" in message
        assert "spectral_norm" in message
        assert "jac_vecs" in message
        assert "\n" not in message


def test_trainers_write_the_warning_to_their_log(monkeypatch):
    monkeypatch.setattr(adjoint, "EVERY", 2)
    lines = []
    with warnings_in(lines.append):
        steps(DEQ(), 1.4, 5)
    assert sum("spectral radius" in line for line in lines) == 1


def test_gradients_and_random_state_stay(monkeypatch):
    quiet, state = steps(DEQ(), 1.4, 4), torch.get_rng_state()
    monkeypatch.setattr(adjoint, "EVERY", 2)
    with pytest.warns(DEQWarning, match="spectral radius"):
        assert torch.equal(steps(DEQ(), 1.4, 4), quiet)
    assert torch.equal(torch.get_rng_state(), state)


def test_silent_with_several_processes(monkeypatch):
    monkeypatch.setattr(adjoint, "EVERY", 2)
    monkeypatch.setattr(adjoint, "_several_processes", lambda: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(DEQ(), 1.4, 4)
    assert radius_warnings(caught) == []


def test_silent_for_the_contractive_layer(monkeypatch):
    """However large its weight: the growth is at most the bound."""
    monkeypatch.setattr(adjoint, "EVERY", 1)
    torch.manual_seed(0)
    layer, deq = ContractiveLayer(4, 8, bound=0.95), DEQ()
    with torch.no_grad():
        layer.mix.parametrizations.weight.original.mul_(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u = layer.inject(torch.randn(3, 4))
        deq(lambda z: layer(z, u), torch.zeros_like(u)).z.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(monkeypatch, reentrant):
    monkeypatch.setattr(adjoint, "EVERY", 1)
    deq, u = DEQ(), torch.ones(3, 2, requires_grad=True)

    def forward(u):
        return deq(lambda z: 1.4 * z.flip(1) + u, torch.zeros(3, 2)).z

    z = torch.utils.checkpoint.checkpoint(forward, u, use_reentrant=reentrant)
    with pytest.warns(DEQWarning, match="spectral radius"):
        z.sum().backward()
    # z = 1.4 z + u for equal entries: dz/du = -2.5
    torch.testing.assert_close(u.grad, torch.full((3, 2), -2.5), rtol=1e-3, atol=0)
