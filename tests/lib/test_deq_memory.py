"""What an equilibrium keeps between forward and backward, and that nothing stays behind."""

import gc
import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lib.deq import DEQ
from lib.runs.evaluation_loop import release_free_memory
from lib.solvers import SOLVERS, anderson, broyden
from measures import saved_bytes


class Layer(nn.Module):
    """tanh(w z + x), cheap enough for large states."""

    def __init__(self, batch: int = 4, size: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(size))
        self.x = torch.randn(batch, size)
        self.z0 = torch.zeros(batch, size)

    def forward(self, z):
        return torch.tanh(0.6 * self.weight * z + self.x)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("jac_vecs", [0, 1])
def test_saved_bytes_do_not_grow_with_iterations(name, jac_vecs):
    layer, nfe, found = Layer(), [], []
    deq = DEQ(partial(SOLVERS[name], eps=0.0))
    for f_thres in (10, 20, 40, 80):
        solve = partial(deq, layer, layer.z0, f_thres=f_thres, jac_vecs=jac_vecs)
        found.append(saved_bytes(solve))
        nfe.append(deq.stats.forward.last["nfe"])
    print(f"f_thres 10, 20, 40, 80: {found} bytes saved, {nfe} evaluations")
    assert len(set(found)) == 1
    assert found[0] > 0
    if not jac_vecs:  # no more than one plain evaluation of f
        point = layer.z0.clone().requires_grad_()
        assert found[0] == saved_bytes(lambda: layer(point))
    assert nfe[0] < nfe[-1]  # or the test would show nothing


@pytest.fixture
def frozen():
    """Sets aside what lives already: collections and counts of objects are of newer ones alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    """What is in use: without what malloc keeps for later."""
    release_free_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


SHORT = {"f_thres": 4, "b_thres": 5}  # enough for an adjoint that does not warn


def step_forward_only(deq, layer):
    deq(layer, layer.z0, **SHORT, jac_vecs=1)


def step_plain(deq, layer):
    deq(layer, layer.z0, **SHORT).z.sum().backward()


def step_with_jacobian_loss(deq, layer):
    found = deq(layer, layer.z0, **SHORT, jac_vecs=1, sradius_iters=4)
    (found.z.sum() + found.jac_loss).backward()


def step_retained(deq, layer):
    loss = deq(layer, layer.z0, **SHORT).z.sum()
    loss.backward(retain_graph=True)
    loss.backward()


def step_create_graph(deq, layer):
    torch.autograd.grad(deq(layer, layer.z0, **SHORT).z.sum(), layer.weight, create_graph=True)


def step_evaluation(deq, layer):
    deq(layer, layer.z0, **SHORT, training=False).z.sum().backward()


STEPS = [
    step_forward_only,
    step_plain,
    step_with_jacobian_loss,
    step_retained,
    step_create_graph,
    step_evaluation,
]


@pytest.mark.parametrize(
    ("step", "solver"), [*[(step, broyden) for step in STEPS], (step_plain, anderson)]
)
def test_steps_leave_nothing(frozen, step, solver):
    """A state has 393 kB here: one that stayed behind at every step would come to 3.9 MB."""
    layer = Layer(batch=12, size=8192)
    deq = DEQ(partial(solver, eps=0.0))
    for number in range(16):
        step(deq, layer)
        if number == 5:  # what is allocated once is there by now
            tensors, memory = live_tensors(), resident_bytes()
    assert live_tensors() <= tensors
    assert resident_bytes() - memory < 2e6


def test_forward_without_backward_frees_its_graph():
    layer = Layer()
    found = DEQ("broyden")(layer, layer.z0, jac_vecs=1)
    watched = [weakref.ref(found.z), weakref.ref(found.z_star), weakref.ref(found.jac_loss)]
    gc.disable()
    try:
        del found
        # By reference counts alone: a cycle would hold the graph until the collector runs.
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


def test_solver_memory_does_not_follow_the_threshold():
    """Broyden's factors grow with the steps taken, not with the steps allowed."""
    before = resident_bytes()
    solution = broyden(lambda z: 0.1 * z + 1, torch.zeros(1, 500_000), threshold=10_000)
    assert solution["converged"].all()
    assert resident_bytes() - before < 100e6  # two factors for each allowed step: 40 GB
