"""The state as a tensor of the user's own: in place, hooked, split, compiled, checkpointed."""

import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from halving import EXACT, TIGHT, assert_equal, by_grad, double, solve
from lib.deq import DEQ
from lib.errors import InputError
from lib.solvers import broyden
from problems import largest_relative_error
from toy_layers import ConvTanh, Toy, TwoScales, gradients, loss_of


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_grad
def test_in_place_use(grad, training):
    found, x = solve(grad, training=training)
    h = found.z
    h += x
    h.sum().backward()
    assert_equal(x.grad, 1 + EXACT[grad])
    assert_equal(found.z_star, 2.0)  # not the same memory


@pytest.mark.parametrize("grad", ["ift", "shine", "phantom:form=neumann", "jfb", "phantom"])
def test_in_place_head_behind_a_convolution(grad):
    """ReLU(inplace=True) on f(z*), of which f's own backward needs nothing."""

    class Conv(ConvTanh):
        def forward(self, z):
            return nn.functional.conv2d(torch.tanh(z), self.kernel, padding=1) + self.x

    layer, found = Conv(), []
    for inplace in (False, True):
        z = DEQ(TIGHT, grad=grad)(layer, layer.z0, f_thres=200, b_thres=200).z
        found.append(gradients(loss_of(nn.ReLU(inplace)(z)), layer))
    assert largest_relative_error(found[1], found[0]) == 0


@by_grad
def test_in_place_use_of_one_tensor_of_a_list(grad):
    results = []
    for inplace in (False, True):
        for batch in (1, 2):  # of one sample, a part of the state is contiguous
            layer = TwoScales()
            layer.high, layer.low = (nn.Parameter(t[:batch]) for t in (layer.high, layer.low))
            z0 = [t[:batch] for t in layer.z0]
            z = DEQ(TIGHT, grad=grad)(layer, z0, f_thres=30, b_thres=200).z
            first = z[0].relu_() if inplace else z[0].relu()
            results.append(gradients(loss_of([first, z[1]]), layer))
    for plain, inplace in zip(results[:2], results[2:], strict=True):
        assert largest_relative_error(inplace, plain) == 0


def test_in_place_use_without_gradients_spares_the_callers_start():
    start = double((1, 3), 2.0)  # the fixed point itself
    with torch.no_grad():
        for training in (True, False):
            found = DEQ(TIGHT)(lambda z: 0.5 * z + 1, start, training=training)
            found.z.zero_()
            assert_equal(found.z_star, 2.0)
            found.z_star.zero_()
            assert_equal(start, 2.0)


def test_in_place_use_spares_what_f_holds():
    x = double((1, 3), 1.0)
    for grad in ("ift", "jfb"):
        with torch.no_grad():
            DEQ(TIGHT, grad=grad)(lambda z: x, double((1, 3), 0.0)).z.zero_()
    assert_equal(x, 1.0)


@by_grad
def test_gradient_at_the_state_and_split_backward(grad):
    found, x = solve(grad)
    (at_z,) = torch.autograd.grad(found.z.sum(), found.z, retain_graph=True)
    assert_equal(at_z, 1.0)
    torch.autograd.backward(found.z, at_z)
    assert_equal(x.grad, EXACT[grad])


@by_grad
def test_users_hooks(grad):
    found, x = solve(grad)
    seen = []
    found.z.register_hook(lambda g: seen.append(g.clone()))
    found.z.register_hook(lambda g: 10 * g)
    found.z.retain_grad()
    found.z.sum().backward()
    assert_equal(seen[0], 1.0)
    assert_equal(found.z.grad, 10.0)
    assert_equal(x.grad, 10 * EXACT[grad])


@by_grad
def test_retained_graph(grad):
    found, x = solve(grad)
    for times in (1, 2, 3):
        found.z.sum().backward(retain_graph=times < 3)
        assert_equal(x.grad, times * EXACT[grad])


# ---- forward mode ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
@by_grad
def test_forward_mode(grad, recording, training):
    """The tangent that the gradient is the transpose of, or a refusal in words."""
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        x = forward_ad.make_dual(double((1, 3), 1.0, requires_grad=True), double((1, 3), 3.0))
        if grad.startswith(("shine", "reversible")):
            with pytest.raises(InputError, match="no forward mode"):
                solve(grad, x, training=training)
            return
        value, tangent = forward_ad.unpack_dual(solve(grad, x, training=training)[0].z)
        assert_equal(value, 2.0)
        assert_equal(tangent, 3 * EXACT[grad])


@pytest.mark.parametrize("layer", [Toy, ConvTanh, TwoScales])
def test_forward_mode_of_a_layer(layer):
    """Against reverse mode: u'(dz/dp v) from both."""
    layer = layer()
    generator = torch.Generator().manual_seed(1)
    like = partial(torch.randn, generator=generator, dtype=torch.float64)
    deq = DEQ(TIGHT, "gmres:eps=1e-13")
    parameters = dict(layer.named_parameters())
    moves = {name: like(p.shape) for name, p in parameters.items()}

    def flat(layer):
        z = deq(layer, layer.z0, f_thres=200, b_thres=200).z
        return torch.cat([t.flatten() for t in z]) if isinstance(z, list) else z.flatten()

    z = flat(layer)
    u = like(z.shape)
    grads = torch.autograd.grad(z, list(parameters.values()), u)
    expected = sum((g * v).sum() for g, v in zip(grads, moves.values(), strict=True))
    with forward_ad.dual_level():
        for name, p in parameters.items():
            delattr(layer, name)
            setattr(layer, name, forward_ad.make_dual(p.detach(), moves[name]))
        tangent = forward_ad.unpack_dual(flat(layer)).tangent
    assert (u @ tangent).item() == pytest.approx(expected.item(), rel=1e-9)


def test_forward_mode_that_is_not_solved_warns():
    deq = DEQ("broyden", "fixed_point_iteration")
    with forward_ad.dual_level():
        a = forward_ad.make_dual(torch.tensor(0.9), torch.tensor(1.0))
        with pytest.warns(RuntimeWarning, match="tangent is not solved"):
            deq(lambda z: a * z + 1, torch.zeros(1, 3), b_thres=2)


# ---- second derivatives, transforms ----------------------------------------------------------

HOOKED = [grad for grad in EXACT if grad.startswith(("ift", "shine")) or "neumann" in grad]


@pytest.mark.parametrize("grad", HOOKED)
def test_forward_over_reverse_is_refused(grad):
    with forward_ad.dual_level():
        x = double((1, 3), 1.0, requires_grad=True)
        found, _ = solve(grad, x)
        weight = forward_ad.make_dual(double((1, 3), 1.0), double((1, 3), 1.0))
        with pytest.raises(RuntimeError, match="forward mode over reverse mode"):
            (found.z * weight).sum().backward()
        if not grad.startswith("shine"):
            found, _ = solve(grad, forward_ad.make_dual(x, double((1, 3), 1.0)))
            with pytest.raises(RuntimeError, match="forward mode over reverse mode"):
                found.z.sum().backward()


def test_reverse_over_forward_is_refused():
    x = double((1, 3), 1.0, requires_grad=True)
    with forward_ad.dual_level():
        z = solve("ift", forward_ad.make_dual(x, x.detach()))[0].z
        tangent = forward_ad.unpack_dual(z).tangent
        with pytest.raises(RuntimeError, match="second derivatives"):
            tangent.sum().backward()


@pytest.mark.parametrize("grad", HOOKED)
def test_batched_gradients_are_refused(grad):
    found, x = solve(grad)
    many = torch.eye(3, dtype=torch.float64)[:, None]
    with pytest.raises(RuntimeError, match="one after the other"):
        torch.autograd.grad(found.z, x, many, is_grads_batched=True)


def test_jacobian_row_by_row():
    found = torch.autograd.functional.jacobian(lambda x: solve("ift", x)[0].z, double((1, 3), 1.0))
    assert torch.allclose(found[0, :, 0], 2 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jacfwd", "functionalize"])
@by_grad
def test_transforms_are_refused(grad, transform):
    def through(x):
        return solve(grad, x)[0].z.sum()

    with pytest.raises(InputError, match=r"torch\.func") as caught:
        getattr(torch.func, transform)(through)(double((2, 3), 1.0))
    assert "\n" not in str(caught.value)
    assert "torch.autograd" in str(caught.value)


# ---- the compiler, checkpointing -------------------------------------------------------------


class Net(nn.Module):
    """A linear injection, an equilibrium, a head that works in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.head = nn.Linear(5, 16), nn.Linear(16, 2)
        self.weight = nn.Parameter(torch.randn(16, 16) / 8)
        self.deq = DEQ("anderson:eps=1e-5")
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)

        def f(z: Tensor) -> Tensor:
            self.evaluations += 1
            return torch.tanh(z @ self.weight.T + u)

        return self.head(self.deq(f, u.new_zeros(len(x), 16)).z.relu_())


def test_the_compiler_does_not_look_into_a_solve():
    net, x = Net(), torch.randn(4, 5)
    expected = gradients(net(x).sum(), net)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    found = gradients(compiled(x).sum(), net)
    assert largest_relative_error(found, expected) <= 1e-5
    assert counter.frame_count <= 2  # before the solve and after it


def test_a_compiled_f_stays_compiled():
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def f(z):
        return torch.cos(z)

    @torch.compile(backend="eager")
    def outer(z0):
        return DEQ("anderson:eps=1e-6")(f, z0).z

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(outer(torch.zeros(2, 3)), torch.full((2, 3), 0.739085))
    assert counter.frame_count == 1


def test_a_whole_graph_and_an_export_are_refused_in_words():
    net, x = Net(), torch.randn(4, 5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile f alone"):
        torch.compile(net, backend="eager", fullgraph=True)(x)
    with pytest.raises(InputError, match="export f alone"):
        torch.export.export(net, (x,))


@pytest.mark.parametrize("grad", ["ift", "shine", "phantom:form=neumann", "jfb"])
def test_compiled_autograd_is_right_or_refused_in_words(grad):
    torch._dynamo.reset()
    found, x = solve(grad)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        if grad == "jfb":  # an ordinary graph, as those of phantom, unroll and reversible
            found.z.sum().backward()
            assert_equal(x.grad, EXACT[grad])
            return
        with pytest.raises(RuntimeError, match=r"leave .*compiled_autograd off"):
            found.z.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_solves_twice_at_most(use_reentrant):
    net, x = Net(), torch.randn(4, 5, requires_grad=True)
    net(x).sum().backward()
    expected, once = [p.grad.clone() for p in net.parameters()], net.evaluations
    net.zero_grad()
    net.evaluations = 0
    checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
    assert net.evaluations <= 2 * once
    assert largest_relative_error([p.grad for p in net.parameters()], expected) == 0


# ---- every gradient in every mode ------------------------------------------------------------

MODES = {
    "train": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", ["ift", "shine", "jfb", "phantom", "phantom:form=neumann",
                                  "reversible", "unroll"])  # fmt: skip
def test_every_gradient_in_every_mode(grad, mode, training):
    """With all defaults but the solver that shine needs."""
    deq = DEQ("broyden" if grad == "shine" else "anderson", grad=grad)
    with warnings.catch_warnings(), MODES[mode]():
        warnings.simplefilter("error")
        x = torch.ones(1, 3, requires_grad=True)
        found = deq(
            lambda z: 0.5 * z + x, torch.zeros(1, 3), training=training, jac_vecs=1,
            sradius_iters=10,
        )  # fmt: skip
    torch.testing.assert_close(found.z.detach(), torch.full((1, 3), 2.0), rtol=2e-3, atol=0)
    assert found.sradius.item() == pytest.approx(0.5, rel=1e-5)
    documented = (
        "result lowest nstep abs_trace rel_trace prot_break nfe converged residual finite "
        "sample_nfe products reason abs_lowest rel_lowest eps threshold stop_mode"
    )
    assert set(documented.split()) <= set(found.solution)
    if mode == "train":
        found.z.sum().backward()
        assert x.grad is not None


def test_spectral_radius_of_what_inference_mode_made_is_refused():
    with torch.inference_mode():
        x = torch.ones(1, 3)
        with pytest.raises(InputError, match=r"torch\.no_grad"):
            DEQ()(lambda z: torch.tanh(z * x), torch.zeros(1, 3), sradius_iters=5)


def test_shine_says_where_it_has_no_directions():
    deq, x = DEQ(partial(broyden, eps=1e-6), grad="shine"), double((1, 3), 1.0, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="shine has no directions"):
        deq(lambda z: 0.5 * z + x, double((1, 3), 2.0))


# ---- what training says ----------------------------------------------------------------------


def test_an_unsolved_forward_is_said_once():
    deq, x = DEQ(), torch.ones(1, 3)

    def run(a: float, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            deq(lambda z: a * z + x, torch.zeros(1, 3), **options)
        return [str(w.message) for w in caught]

    assert run(0.1) == []
    assert run(0.1, f_thres=2, training=False) == []
    with torch.no_grad():
        assert run(0.1, f_thres=2) == []
    (message,) = run(0.1, f_thres=2)
    assert "after 2 evaluations" in message
    assert "raise f_thres" in message
    assert run(0.1, f_thres=2) == []
    deq.f_solver = "fixed_point_iteration"
    (message,) = run(3.0)
    assert "diverged" in message
    assert run(3.0) == []


def test_an_iteration_that_does_not_settle_is_said_once():
    deq = DEQ(grad="unroll")
    with pytest.warns(RuntimeWarning, match="relative residual"):
        deq(lambda z: -z + 1, torch.zeros(1, 3))
