"""CUDA graphs of f and its products: what is copied when, and every way back to f itself.

Here the operations of f are recorded and replayed on the CPU, on the same memory each time. A real
GPU records them in tests/test_on_a_gpu.py.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from lib.deq import DEQ, DEQWarning
from lib.graphs import MOST, Graphs
from lib.solvers.maps import transformed, vjp
from recorded_graphs import OnCpu

pytestmark = pytest.mark.filterwarnings("error::lib.deq.DEQWarning")


class Layer(nn.Module):
    """tanh(W z + x) times a mask; of a list: each part by its own, with the sum of all."""

    def __init__(self, parts: int = 0):
        super().__init__()
        self.parts = parts
        self.inner = nn.Linear(4, 4)
        with torch.no_grad():
            self.inner.weight.copy_(0.4 * torch.eye(4) + 0.1)

    def prepare(self, x: Tensor, mask: Tensor | None = None):
        held = {"weights": [self.inner.weight, self.inner.bias], "x": x, "mask": mask}
        f = self.on(held)
        f.source = lambda: (self.on, held)
        return f

    def on(self, held: dict):
        weight, bias = held["weights"]

        def one(z: Tensor) -> Tensor:
            out = torch.tanh(nn.functional.linear(z, weight, bias) + held["x"])
            return out if held["mask"] is None else out * held["mask"]

        return one if not self.parts else lambda z: [one(t) + 0.1 * sum(z) for t in z]


def trained(graph, *, parts=0, masked=True, f_solver="anderson", grad="ift", amp=False, steps=3):
    """States and gradients of some steps. The weights change in place, the rest is new."""
    torch.manual_seed(0)
    layer = Layer(parts)
    deq = DEQ(f_solver, "broyden", grad=grad)
    deq.graphs = graph
    optimizer, found = torch.optim.SGD(layer.parameters(), lr=0.1), []
    for _ in range(steps):
        x = torch.randn(3, 4, requires_grad=True)
        mask = torch.rand(3, 4) if masked else None
        z0 = [torch.zeros(3, 4)] * parts if parts else torch.zeros(3, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            solution = deq(layer.prepare(2 * x, mask), z0, f_thres=12, b_thres=12, jac_vecs=1)
        ends = solution.z if parts else [solution.z]
        (sum(z.square().sum() for z in ends) + solution.jac_loss).backward()
        found += [
            *(z.detach() for z in ends),
            x.grad,
            *(p.grad.clone() for p in layer.parameters()),
        ]
        optimizer.step()
        optimizer.zero_grad()
    return found, deq


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": False, "f_solver": "broyden:check_every=99"},
        {"f_solver": "anderson:stop=sample", "grad": "phantom:form=neumann"},
        {"f_solver": "fixed_point_iteration:check_every=99", "grad": "jfb"},  # x is a value of f
        {"grad": "ift:order=2"},
        {"amp": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("default::lib.deq.DEQWarning")  # bfloat16 does not converge
def test_a_replay_gives_the_same_bits(parts, options):
    expected, plain = trained(None, parts=parts, **options)
    found, deq = trained(OnCpu(), parts=parts, **options)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert deq.stats.forward.nfe == plain.stats.forward.nfe
    assert deq.graphs.replays


def test_products_of_a_map_that_is_changed_twice():
    layer, z = Layer(), torch.randn(3, 4)
    f = OnCpu().of(layer.prepare(torch.ones(3, 4)))
    for change in (lambda f: lambda z: f(2 * z), lambda f: lambda z: f(z).square()):
        f = transformed(f, change)
    point = z.requires_grad_()
    fz = f(point)
    v = torch.randn(3, 4)
    assert torch.equal(f.product(point, fz)(v), vjp(fz, point, v))


def test_only_the_state_is_copied_for_each_evaluation():
    """Of one step: f for each evaluation, f with its derivative once, then product by product."""
    _, deq = trained(graphs := OnCpu(), steps=1)
    evaluations, products = deq.stats.forward.nfe, deq.stats.backward.nfe - 1  # J'0 costs none
    assert graphs.recorded == 3
    tried = [0], [1, 2]  # once recorded, each is compared with f
    assert graphs.replays == [*tried[0], *[0] * evaluations, *tried[1], 1, *[2] * products]


def test_forwards_that_wait_for_their_backward():
    """Each has its own inputs, whatever the order."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 4)

    def gradients(graphs, order):
        layer, deq = Layer(), DEQ()
        deq.graphs = graphs
        xs = [x.clone().requires_grad_() for x in inputs]
        ends = [deq(layer.prepare(x), torch.zeros(3, 4)).z for x in xs]
        for i in order:
            ends[i].square().sum().backward()
        return [x.grad for x in xs]

    torch.manual_seed(1)
    expected = gradients(None, (0, 1))
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(1)
        found = gradients(OnCpu(), order)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [OnCpu, Graphs])
def test_a_forward_leaves_nothing_behind(kind):
    """Without a backward, and without the garbage collector."""
    layer, deq = Layer(), DEQ()
    deq.graphs = kind()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            x = torch.ones(3, 4, requires_grad=True) * 2
            left = weakref.ref(x)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DEQWarning)  # of Graphs: no GPU
                deq(layer.prepare(x), torch.zeros(3, 4))
            del x
            assert left() is None
    finally:
        gc.enable()


def test_after_inference_mode():
    layer, deq, x = Layer(), DEQ(), torch.ones(3, 4)
    deq.graphs = OnCpu()
    with torch.inference_mode():
        first = deq(layer.prepare(x), torch.zeros(3, 4)).z
    again = deq(layer.prepare(x.requires_grad_()), torch.zeros(3, 4)).z
    again.sum().backward()
    torch.testing.assert_close(first, again.detach(), rtol=1e-2, atol=1e-2)


def test_a_copy_records_its_own():
    _, deq = trained(OnCpu())
    assert deq.graphs._forms
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert type(twin.graphs) is OnCpu
        assert not twin.graphs._forms


# ---- without a graph -----------------------------------------------------------------------------


def solved(f, deq, count=2):
    """The warnings about graphs of some calls, which give the state of a DEQ without graphs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            z = deq(f, torch.zeros(3, 4)).z
    said = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert torch.equal(z, DEQ()(f, torch.zeros(3, 4)).z)
    return said


class Idle(OnCpu):
    def record(self, function):
        return function() or (lambda: None)


class Failing(OnCpu):
    def record(self, function):
        raise RuntimeError("not captured\nas CUDA says")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Graphs, "f is on no GPU"),
        (OnCpu, "f has no source"),
        (Failing, "not captured"),
        (Idle, "Tensor-likes are not close!"),
    ],
)
def test_falls_back_with_a_warning(kind, reason):
    layer, deq = Layer(), DEQ()
    deq.graphs = kind()
    f = layer.prepare(torch.ones(3, 4))
    if kind is OnCpu:
        del f.source
    assert set(solved(f, deq)) == {f"no CUDA graph: {reason}"}


def test_an_f_that_is_random_is_not_replayed():
    layer, deq = Layer(), DEQ()
    deq.graphs = OnCpu()
    f = layer.prepare(torch.ones(3, 4))
    layer.on = lambda held: lambda z: torch.rand_like(z)
    f.source = lambda: (layer.on, {"x": torch.ones(3, 4)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deq(f, torch.zeros(3, 4), training=False)
    said = {str(w.message) for w in caught}
    assert "no CUDA graph: Tensor-likes are not close!" in said
    assert set(deq.graphs._forms.values()) == {None}


def test_at_most_so_many_shapes():
    layer, deq = Layer(), DEQ()
    deq.graphs = OnCpu()

    def solve(size):
        x = torch.ones(size, 4)
        assert deq(layer.prepare(x), torch.zeros(size, 4), training=False).z.shape == x.shape

    with torch.no_grad():
        for size in range(1, MOST + 1):
            solve(size)
        for more in (1, 2):
            with pytest.warns(DEQWarning, match=f"f has more than {MOST} shapes"):
                solve(MOST + more)
    assert sum(form is not None for form in deq.graphs._forms.values()) == MOST
