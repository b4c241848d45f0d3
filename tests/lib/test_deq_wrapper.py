"""The wrapper around a solve: warnings, choice of solvers, statistics."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lib.deq import DEQ, DEQWarning
from lib.errors import InputError
from lib.solvers import anderson, broyden, fixed_point_iteration, gmres
from problems import largest_relative_error
from toy_layers import Fragile, Toy, gradients, loss_of, unrolled_gradients

tight = {"broyden": partial(broyden, eps=1e-13)}
THRESHOLD = 300


@pytest.fixture
def deq():
    return DEQ(tight["broyden"])


def run(deq: DEQ, layer: nn.Module, **options):
    return deq(layer, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD, **options)


def test_poor_adjoint_warns():
    """z = 0.9 z + 1 in two evaluations: y = 0 and y = g, whose residual is 0.9 of g's norm."""
    weight = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    deq = DEQ(tight["broyden"], partial(anderson, eps=1e-9))
    z = deq(lambda z: weight * z + 1, torch.zeros(1, 2, dtype=torch.float64), b_thres=1).z
    with pytest.warns(DEQWarning, match=r"relative residual up to 0\.9.*raise b_thres"):
        z.sum().backward()
    assert weight.grad.item() == pytest.approx(20)  # y = g: that of one step, dz/dw = z


def test_good_solves_do_not_warn(deq):
    layer = Toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(loss_of(run(deq, layer).z), layer)


def test_nan_sample_warns_and_spares_the_others(deq):
    layer = Toy()

    def f(z):
        bad = torch.tensor([[0.0], [torch.nan], [0.0]], dtype=z.dtype)
        return layer(z) + bad

    with pytest.warns(DEQWarning, match="not finite"):
        found = deq(f, layer.z0, f_thres=200)
    assert found.solution["finite"].tolist() == [True, False, True]
    expected = layer.z0
    for _ in range(200):
        expected = layer(expected)
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(found.z_star[keep], expected[keep], rtol=0, atol=1e-10)
    assert torch.isfinite(found.z_star).all()
    assert deq.stats.forward.broken == 1


def test_nan_adjoint_warns_and_spares_the_others(deq, fragile):
    layer = Toy()
    x = layer.x.detach().clone().requires_grad_()

    def f(z):
        return torch.tanh(Fragile.apply(z) @ layer.w.T + x)

    z = deq(f, layer.z0, f_thres=200, b_thres=200).z
    (expected,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    fragile("nan")
    with pytest.warns(DEQWarning, match="unsolved"):
        (found,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-10)
    slope = 1 - z[0].detach().square()  # sample 0 passes its gradient on as it came
    torch.testing.assert_close(found[0], slope, rtol=0, atol=1e-10)


def test_solvers_by_name_and_by_callable():
    own = partial(anderson, m=3)
    deq = DEQ("broyden", "same")
    assert deq.f_solver is deq.b_solver is broyden
    deq.f_solver = own  # the adjoint follows
    assert deq.f_solver is deq.b_solver is own
    deq.b_solver = "fixed_point_iteration"
    assert deq.b_solver is fixed_point_iteration
    deq.b_solver = "same"
    assert deq.b_solver is own
    for assign in ("f_solver", "b_solver"):
        with pytest.raises(InputError, match=r"newton'.*anderson, .*broyden"):
            setattr(deq, assign, "newton")
        with pytest.raises(InputError, match="newton"):
            DEQ(**{"f_solver": "anderson", assign: "newton"})
    assert deq.f_solver is own


def test_adjoint_is_solved_by_gmres_to_the_forward_tolerance():
    deq = DEQ("anderson:m=4,eps=1e-7,stop=sample,max_nfe=9")
    assert deq.b_solver.func is gmres
    assert deq.b_solver.keywords == {"eps": 1e-7, "stop": "sample", "max_nfe": 9}
    deq.f_solver = "broyden"
    assert (deq.b_solver.func, deq.b_solver.keywords) == (gmres, {})

    def own(f, x0, **options):
        return anderson(f, x0, **options)

    deq.f_solver = own  # its tolerance is not known
    assert deq.b_solver is own


def test_own_solver_with_the_fewest_keys():
    """A user's solver need only return what the first DEQ code returned."""

    def ten_times(f, x0, threshold, stop_mode):
        z = x0
        for _ in range(threshold):
            z = f(z)
        gap = (f(z) - z).norm().item()
        return {"result": z, "nstep": 0, "abs_trace": [gap], "rel_trace": [gap]}

    layer = Toy()
    deq = DEQ(ten_times)
    found = gradients(loss_of(deq(layer, layer.z0, f_thres=120, b_thres=120).z), layer)
    assert largest_relative_error(found, unrolled_gradients(layer)) <= 1e-7


def test_own_solver_that_stops_early_is_told_of():
    """With the keys that the first DEQ code documents, among them eps but not the stop mode."""

    def once(f, x0, threshold, stop_mode):
        gap = (f(x0) - x0).norm().item()
        return {
            **{"result": x0, "lowest": gap, "nstep": 0, "prot_break": False, "eps": 1e-3},
            **{"abs_trace": [gap], "rel_trace": [gap], "threshold": threshold},
        }

    layer = Toy()
    with pytest.warns(DEQWarning, match=r"a forward solve stopped early.*\(eps 0\.001, rel\)"):
        DEQ(once)(layer, layer.z0)


def test_own_solver_that_works_in_place():
    def in_place(f, x0, threshold, stop_mode):
        for _ in range(threshold):
            x0.copy_(f(x0))
        return {"result": x0}

    weight = torch.tensor(0.5, requires_grad=True)
    found = DEQ("anderson", in_place)(lambda z: weight * z + 1, torch.zeros(2, 3))
    found.z.sum().backward()
    # z = 1 / (1 - w) in six places, and dz / dw = z^2.
    assert weight.grad.item() == pytest.approx(24, rel=1e-4)


def test_stop_modes_reach_the_solvers():
    asked = []

    def spy(f, x0, **options):
        asked.append(options)
        return anderson(f, x0, **options)

    layer = Toy()
    DEQ(spy, stop_mode="abs")(layer, layer.z0, f_thres=7, b_thres=9).z.sum().backward()
    DEQ(spy, stop_mode="abs", b_stop_mode="rel")(layer, layer.z0).z.sum().backward()
    # Neither eps nor name is passed, so that a partial's own hold.
    assert asked == [
        {"threshold": 7, "stop_mode": "abs"},
        {"threshold": 9, "stop_mode": "abs"},
        {"threshold": 30, "stop_mode": "abs"},
        {"threshold": 40, "stop_mode": "rel"},
    ]


def test_statistics():
    layer, calls = Toy(), []
    deq = DEQ(partial(anderson, eps=1e-6))
    for f_thres in (5, 50):
        found = deq(layer, layer.z0, f_thres=f_thres, on_solve=lambda *a: calls.append(a))
        found.z.sum().backward()
    assert [which for which, _ in calls] == ["forward", "backward"] * 2
    solutions = [solution for which, solution in calls if which == "forward"]
    assert solutions[0]["nfe"] == 5
    forward = deq.stats.forward
    assert (forward.solves, deq.stats.backward.solves) == (2, 2)
    mean = forward.means()
    assert mean["nfe"] == sum(s["nfe"] for s in solutions) / 2
    assert mean["rel_residual"] == pytest.approx(sum(s["lowest"] for s in solutions) / 2)
    assert mean["broken"] == 0
    assert forward.last["rel_residual"] == solutions[1]["lowest"]
    deq.stats.reset()
    assert deq.stats.forward.solves == deq.stats.backward.solves == 0
    assert deq.stats.forward.means()["nfe"] == 0
