"""What users do with a layer and its states that once went wrong without a word."""

import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from halving import NEAR, TIGHT, assert_equal, by_grad, double, solve
from lib.deq import DEQ
from lib.errors import InputError
from problems import largest_relative_error
from toy_layers import gradients

W = torch.tensor([[0.5, 0.2, 0], [0, 0.4, 0.1], [0.3, 0, 0.2]], dtype=torch.float64)


def through(grad: str = "ift"):
    deq = DEQ(TIGHT, "gmres:eps=1e-12", grad=grad)
    return lambda x: deq(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x)).z


def test_a_jvp_by_two_backwards_is_refused_or_right():
    """It differentiates a gradient by the direction that it was taken in."""
    x, v = double((1, 3), 1.0), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.functional.jvp(through(), x, v)
    _, found = torch.autograd.functional.jvp(through("ift:order=2"), x, v)
    jacobian = torch.autograd.functional.jacobian(through(), x)[0, :, 0]
    torch.testing.assert_close(found, v @ jacobian.T)


def test_traces_are_refused():
    x = double((1, 3), 1.0)
    with pytest.raises(InputError, match="traced"):
        torch.func.linearize(through(), x)
    with torch._subclasses.FakeTensorMode(), pytest.raises(InputError, match="traced"):
        through()(torch.ones(1, 3))


def test_batched_tangents_are_refused():
    for grad in ("ift", "unroll"):
        with pytest.raises(RuntimeError, match="one after the other"):
            torch.autograd.functional.jacobian(
                through(grad), double((1, 3), 1.0), vectorize=True, strategy="forward-mode"
            )


@pytest.mark.parametrize("size", [1e-13, 1.0, 1e13])
def test_tangents_of_any_size(size):
    x, v = double((1, 3), 1.0), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(through(), x)[0, :, 0]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(through()(forward_ad.make_dual(x, size * v))).tangent
    torch.testing.assert_close(tangent / size, v @ jacobian.T)


@by_grad
def test_states_on_the_way_are_tensors_of_their_own(grad):
    found, _ = solve(grad, indexing=(2, 2, 1000))
    assert len({state.data_ptr() for state in found.states}) == 4
    loss = 0
    for h in found.states:
        h -= 1.0
        loss = loss + h.square().sum()
    loss.backward()
    torch.testing.assert_close(found.z[0, 0].item(), 1.0, **NEAR)


def test_in_place_use_of_a_state_on_the_way():
    x = double((1, 3), 1.0, requires_grad=True)
    found = DEQ()(lambda z: torch.tanh(0.5 * z + x), double((1, 3), 0.0), indexing=(2,))
    h = found.states[0]
    h += 1.0
    h.sum().backward()


@pytest.mark.parametrize("grad", ["ift", "ift:order=2"])
def test_in_half_precision_what_f_refers_to_may_change_before_backward(grad):
    """A loop variable, or a buffer that is filled anew: backward must not evaluate f with it."""
    found = []
    for bound in (True, False):
        torch.manual_seed(0)
        layer, deq, states, now = nn.Linear(8, 8), DEQ(grad=grad), [], {}
        inputs = [size * torch.randn(2, 8) for size in (1.0, 6.0)]
        with torch.autocast("cpu", torch.bfloat16):
            for now["x"] in inputs:
                x = dict(now) if bound else now
                f = partial(lambda z, x, layer: torch.tanh(layer(z) + x["x"]), x=x, layer=layer)
                states.append(deq(f, torch.zeros(2, 8)).z)
        found.append(gradients(states[0].square().sum(), layer))
    assert largest_relative_error(found[1], found[0]) < 0.03  # of bfloat16


def test_in_half_precision_z_star_may_be_changed():
    found = []
    for change in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(8, 8), torch.randn(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            s = DEQ()(lambda z, x=x, layer=layer: torch.tanh(layer(z) + x), torch.zeros(2, 8))
        if change:
            s.z_star.fill_(5.0)
        found.append(gradients(s.z.sum(), layer))
    assert largest_relative_error(found[1], found[0]) == 0


def test_an_adjoint_that_rises_to_the_end_is_said():
    """A radius just above one: the residual is 0.07 and grows, the gradient is 146 % off."""
    x, j = torch.zeros(1, 2, requires_grad=True), torch.diag(torch.tensor([1.01, 0.0]))
    z = DEQ("broyden", "fixed_point_iteration")(lambda z: z @ j + x, torch.zeros(1, 2)).z
    with pytest.warns(RuntimeWarning, match="rose to the end"):
        z.backward(torch.tensor([[0.05, 1.0]]))


def test_samples_that_stopped_by_themselves_are_solved():
    """Their batch norm may be above the tolerance that each of them is below."""
    deq = DEQ("anderson:stop=sample", stop_mode="abs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deq(lambda z: 0.9 * z + 1, torch.zeros(512, 3), f_thres=200)
    assert found.solution["converged"].all()


@pytest.mark.parametrize("grad", ["ift", "unroll", "reversible"])
def test_bad_maps_are_refused_by_every_gradient(grad):
    start = torch.zeros(1, 3)
    bad = {
        "writes to a state": lambda z: z.mul_(0.5).add_(1),
        "the same shape": lambda z: 0.5 * z + torch.ones(4, 3),
        "gave tuple": lambda z: (z,),
    }
    for words, f in bad.items():
        with pytest.raises(InputError, match=words):
            DEQ(grad=grad)(f, start)
    for z0 in (torch.zeros(0, 3), torch.zeros(1, 3, dtype=torch.long), None, 3):
        with pytest.raises(InputError):
            DEQ(grad=grad)(torch.cos, z0)
    with pytest.raises(InputError, match="threshold is 0"):
        DEQ(grad=grad)(torch.cos, start, f_thres=0)


def test_lists_of_other_shapes_are_refused():
    z0 = [torch.zeros(3, 3), torch.zeros(3, 2)]
    for f in (
        lambda z: [0.5 * z[1], 0.5 * z[0]],
        lambda z: z[0],
        lambda z: {"a": z[0], "b": z[1]},
        lambda z: None,
    ):
        with pytest.raises(InputError, match="a list of the shapes"):
            DEQ()(f, z0)


def test_a_dict_is_no_state():
    with pytest.raises(InputError, match=r"^z0 is 'dict', but must be a tensor"):
        DEQ()(lambda z: z, {"a": torch.zeros(300, 3)})


def test_own_solver_of_few_keys_in_half_precision():
    def own(f, z, threshold, **_):
        for _ in range(threshold):
            z = f(z)
        return {"result": z}

    x = torch.ones(1, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = DEQ(own)(lambda z: 0.5 * z + x, torch.zeros(1, 3)).z
        z.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0), rtol=1e-2, atol=0)


def test_a_reversible_f_that_differentiates_itself_is_refused():
    def f(z):
        with torch.enable_grad():
            q = z.detach().requires_grad_()
            return torch.autograd.grad((q**2).sum(), q, create_graph=True)[0] / 4 + 1

    with pytest.raises(RuntimeError, match="differentiates itself"):
        DEQ(grad="reversible")(f, torch.zeros(1, 3))


def test_saved_tensors_hooks_of_any_kind():
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        found, x = solve()
    found.z.sum().backward()
    assert_equal(x.grad, 2.0)
