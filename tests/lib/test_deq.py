"""The implicit gradient against unrolled autograd and dense solves, and how the wrapper behaves."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lib.deq import DEQ, DEQWarning, SolverAttributes, stacked
from lib.errors import InputError
from lib.jacobian import jac_loss_estimate
from lib.solvers import SOLVERS, anderson, broyden, fixed_point_iteration
from problems import largest_relative_error

# Both solves end at 1e-13, five digits below what is asserted of the gradients.
tight = {name: partial(solver, eps=1e-13) for name, solver in SOLVERS.items()}
THRESHOLD = 300


class Toy(nn.Module):
    """tanh(W z + U x + b), a contraction: ||W|| = 0.7."""

    def __init__(self, size: int = 6, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        w = draw(size, size)
        self.w = nn.Parameter(0.7 * w / torch.linalg.matrix_norm(w, ord=2))
        self.u, self.b = nn.Parameter(draw(size, size)), nn.Parameter(draw(size))
        self.x = nn.Parameter(draw(3, size))
        self.z0 = torch.zeros(3, size, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x @ self.u.T + self.b)


class ConvTanh(nn.Module):
    """tanh(conv(z) + x) on a state (B, C, H, W)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.kernel = nn.Parameter(0.11 * draw(2, 2, 3, 3))
        self.x = nn.Parameter(draw(2, 2, 4, 5))
        self.z0 = torch.zeros(2, 2, 4, 5, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(z, self.kernel, padding=1) + self.x)


class TwoScales(nn.Module):
    """A state of two tensors, (B, 2, 4, 4) and (B, 3, 2, 2), each in the other's equation."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.down, self.up = nn.Parameter(0.2 * draw(3, 2)), nn.Parameter(0.2 * draw(2, 3))
        self.high, self.low = nn.Parameter(draw(2, 2, 4, 4)), nn.Parameter(draw(2, 3, 2, 2))
        self.z0 = [torch.zeros_like(self.high), torch.zeros_like(self.low)]

    def forward(self, z: list[Tensor]) -> list[Tensor]:
        high, low = z
        pooled = nn.functional.avg_pool2d(high, 2)
        raised = nn.functional.interpolate(low, scale_factor=2)
        return [
            torch.tanh(0.4 * high + torch.einsum("oi,bihw->bohw", self.up, raised) + self.high),
            torch.tanh(0.4 * low + torch.einsum("oi,bihw->bohw", self.down, pooled) + self.low),
        ]


LAYERS = {"toy": Toy, "rank 4": ConvTanh, "list": TwoScales}
by_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def loss_of(z: Tensor | list[Tensor], power: int = 2) -> Tensor:
    """A loss whose gradient differs from element to element."""
    flat = torch.cat([t.flatten() for t in z]) if isinstance(z, list) else z.flatten()
    ramp = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)
    return (ramp * flat**power).sum()


def gradients(loss: Tensor, layer: nn.Module, **options) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters()), **options))


def unrolled_gradients(layer: nn.Module, power: int = 2) -> list[Tensor]:
    """Autograd through 200 applications: 0.85^200 is far below rounding of the figures here."""
    z = layer.z0
    for _ in range(200):
        z = layer(z)
    return gradients(loss_of(z, power), layer)


def dense_gradients(layer: nn.Module) -> list[Tensor]:
    """dL/dtheta = y' df/dtheta with (I - J)' y = dL/dz, J written out as a matrix."""
    is_list = isinstance(layer.z0, list)
    parts = layer.z0 if is_list else [layer.z0]

    def flat(tensors) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])

    def f(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parts])
        z = [v.view(p.shape) for v, p in zip(pieces, parts, strict=True)]
        return flat(layer(z)) if is_list else layer(z[0]).flatten()

    with torch.no_grad():
        z = flat(parts)
        for _ in range(300):
            z = f(z)
    z.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, z)
    (grad,) = torch.autograd.grad(loss_of(z), z)
    adjoint = torch.linalg.solve((torch.eye(len(z), dtype=z.dtype) - jacobian).T, grad)
    return list(torch.autograd.grad(f(z), list(layer.parameters()), adjoint))


@by_layer
@pytest.mark.parametrize("f_solver", tight)
@pytest.mark.parametrize("b_solver", tight)
def test_gradient(layer, f_solver, b_solver):
    layer = layer()
    deq = DEQ(tight[f_solver], tight[b_solver])
    z = deq(layer, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD).z
    found = gradients(loss_of(z), layer)
    unrolled = largest_relative_error(found, unrolled_gradients(layer))
    dense = largest_relative_error(found, dense_gradients(layer))
    print(f"relative error against unrolled {unrolled:.1e}, against dense {dense:.1e}")
    assert unrolled <= 1e-7
    assert dense <= 1e-7


def test_gradcheck():
    layer = ConvTanh()
    deq = DEQ(tight["broyden"])

    def through(kernel, x):
        def f(z):
            return torch.tanh(nn.functional.conv2d(z, kernel, padding=1) + x)

        return deq(f, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD).z

    inputs = (layer.kernel, layer.x)
    assert torch.autograd.gradcheck(through, inputs, check_undefined_grad=False)


@pytest.mark.xfail(raises=TypeError, strict=True, reason="the hook does not expect None")
def test_undefined_gradient(deq):
    """An operation behind z may say that it has no gradient at all: None, not zeros."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    layer = Toy()
    loss = NoGradient.apply(run(deq, layer).z) + layer.b.sum()
    found = gradients(loss, layer, materialize_grads=True)
    expected_grads = gradients(layer.b.sum(), layer, materialize_grads=True)
    for grad, expected in zip(found, expected_grads, strict=True):
        assert torch.equal(grad, expected)


def test_gradient_in_float32():
    layer = Toy().float()
    layer.z0 = layer.z0.float()
    z = DEQ(partial(broyden, eps=1e-6))(layer, layer.z0, f_thres=60, b_thres=60).z
    found = gradients(loss_of(z), layer)
    # eps times the condition of I - J, below 10.
    assert largest_relative_error(found, unrolled_gradients(layer)) < 1e-5


# --- Orders of forward and backward -----------------------------------------------------------


@pytest.fixture
def deq():
    return DEQ(tight["broyden"])


def run(deq: DEQ, layer: nn.Module, **options):
    return deq(layer, layer.z0, f_thres=THRESHOLD, b_thres=THRESHOLD, **options)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(deq, order):
    layers = Toy(seed=1), Toy(seed=2)
    losses = [loss_of(run(deq, layer).z) for layer in layers]
    for i in order:
        found = gradients(losses[i], layers[i])
        assert largest_relative_error(found, unrolled_gradients(layers[i])) <= 1e-7


def test_two_forwards_of_one_layer_in_one_backward(deq):
    layer = Toy()
    loss = loss_of(run(deq, layer).z) + loss_of(run(deq, layer).z, power=3)
    found = gradients(loss, layer)
    parts = zip(unrolled_gradients(layer), unrolled_gradients(layer, power=3), strict=True)
    assert largest_relative_error(found, [a + b for a, b in parts]) <= 1e-7


def test_equilibrium_of_an_equilibrium(deq):
    """The second solve is injected with the first one's result."""
    first, second = Toy(seed=1), Toy(seed=2)

    def loss(solve) -> Tensor:
        z = solve(first, first.z0)
        return loss_of(solve(lambda y: second(y) + 0.1 * z, second.z0))

    def unroll(f, z):
        for _ in range(200):
            z = f(z)
        return z

    both = nn.ModuleList([first, second])
    found = gradients(loss(lambda f, z: deq(f, z, f_thres=200, b_thres=200).z), both)
    assert largest_relative_error(found, gradients(loss(unroll), both)) <= 1e-7


def test_backward_twice_over_a_retained_graph(deq):
    layer = Toy()
    loss = loss_of(run(deq, layer).z)
    expected = unrolled_gradients(layer)
    for keep in (True, True, False):
        found = gradients(loss, layer, retain_graph=keep)
        assert largest_relative_error(found, expected) <= 1e-7
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, layer)


class Fragile(torch.autograd.Function):
    """Identity whose backward raises, or gives NaN for sample 0, while ``mode`` says so."""

    mode = "fine"

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Fragile.mode == "raise":
            raise ZeroDivisionError("inside the adjoint")
        grad = grad.clone()
        if Fragile.mode == "nan":
            grad[0] = torch.nan
        return grad


@pytest.fixture
def fragile(monkeypatch):
    def switch(mode):
        monkeypatch.setattr(Fragile, "mode", mode)

    switch("fine")
    return switch


def test_backward_after_an_exception_in_the_adjoint(deq, fragile):
    layer = Toy()
    loss = loss_of(deq(lambda z: layer(Fragile.apply(z)), layer.z0, f_thres=200, b_thres=200).z)
    fragile("raise")
    with pytest.raises(ZeroDivisionError, match="inside the adjoint"):
        gradients(loss, layer, retain_graph=True)
    fragile("fine")
    expected = unrolled_gradients(layer)
    assert largest_relative_error(gradients(loss, layer), expected) <= 1e-7
    assert largest_relative_error(gradients(loss_of(run(deq, layer).z), layer), expected) <= 1e-7


@pytest.mark.parametrize("where", ["loss", "z"])
def test_double_backward_is_refused(deq, where):
    layer = Toy()
    z = run(deq, layer).z
    if where == "loss":
        first = gradients(loss_of(z), layer, create_graph=True)
    else:  # a gradient that is linear in z still has a second derivative through the adjoint
        first = gradients(z.sum(), layer, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives through an equilibrium"):
        gradients(sum(g.square().sum() for g in first), layer)


def test_create_graph_alone_is_right(deq):
    layer = Toy()
    found = gradients(loss_of(run(deq, layer).z), layer, create_graph=True)
    assert largest_relative_error(found, unrolled_gradients(layer)) <= 1e-7


# --- Jacobian loss, evaluation ----------------------------------------------------------------


def test_jacobian_loss_trains_along(deq):
    """L + c ||v'J||^2 / n with J at a detached z*: both parts against their own graphs."""
    layer = Toy()
    torch.manual_seed(7)
    found = run(deq, layer, jac_vecs=2)
    total = gradients(loss_of(found.z) + 0.3 * found.jac_loss, layer)

    torch.manual_seed(7)
    point = found.z_star.clone().requires_grad_()
    jac_loss = jac_loss_estimate(layer(point), point, vecs=2)
    assert found.jac_loss.item() == pytest.approx(jac_loss.item(), rel=1e-12)
    jac_grads = torch.autograd.grad(jac_loss, list(layer.parameters()), materialize_grads=True)
    parts = zip(unrolled_gradients(layer), jac_grads, strict=True)
    assert largest_relative_error(total, [a + 0.3 * b for a, b in parts]) <= 1e-7


def test_jacobian_loss_falls_in_training():
    layer = Toy()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    deq, seen = DEQ(partial(broyden, eps=1e-8)), []
    torch.manual_seed(0)
    for _ in range(60):
        found = deq(layer, layer.z0, jac_vecs=8)
        optimizer.zero_grad()
        found.jac_loss.backward()
        optimizer.step()
        seen.append(found.jac_loss.item())
    assert sum(seen[-10:]) < 0.2 * sum(seen[:10])


@by_layer
def test_evaluation_gives_z_star_itself_with_gradients(layer, deq):
    layer = layer()
    found = run(deq, layer, training=False)
    is_list = isinstance(found.z, list)
    pairs = zip(found.z, found.z_star, strict=True) if is_list else [(found.z, found.z_star)]
    for z, z_star in pairs:
        assert torch.equal(z, z_star)
        assert z.requires_grad
        assert not z_star.requires_grad
    grads = gradients(loss_of(found.z), layer)
    assert largest_relative_error(grads, unrolled_gradients(layer)) <= 1e-7


def test_training_gives_f_of_z_star():
    layer = Toy()
    deq = DEQ(partial(anderson, eps=0.0))
    found = deq(layer, layer.z0, f_thres=4)
    assert torch.equal(found.z, layer(found.z_star))
    assert not torch.equal(found.z, found.z_star)
    with torch.no_grad():
        again = deq(layer, layer.z0, f_thres=4)
        assert torch.equal(again.z, found.z)
        assert not again.z.requires_grad
        assert torch.equal(deq(layer, layer.z0, f_thres=4, training=False).z, found.z_star)


def test_spectral_radius_of_the_layer(deq):
    layer = Toy()
    found = run(deq, layer, sradius_iters=100)
    for b in range(3):
        z = found.z_star[b : b + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda y, b=b: torch.tanh(y @ layer.w.T + (layer.x @ layer.u.T + layer.b)[b]), z
        )[0, :, 0]
        exact = torch.linalg.eigvals(jacobian).abs().max()
        assert found.sradius[b].item() == pytest.approx(exact.item(), rel=1e-6)


def test_what_is_not_asked_for_is_zero(deq):
    found = run(deq, Toy())
    assert found.jac_loss.item() == 0
    assert found.sradius.tolist() == [[0.0]] * 3


def test_no_gradient_stays_on_the_state_or_on_z0(deq):
    layer = Toy()
    loss_of(run(deq, layer).z).backward()
    assert layer.z0.grad is None


def test_layer_without_parameters(deq):
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    found = deq(torch.cos, z0, f_thres=100)
    assert found.z.flatten().tolist() == pytest.approx([0.7390851332151607] * 6, rel=1e-12)
    # Gradient with respect to nothing, but still a usable tensor in a larger graph.
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    (weight * found.z).sum().backward()
    assert weight.grad.item() == pytest.approx(6 * 0.7390851332151607)


def test_layer_that_ignores_its_state(deq):
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    deq(lambda z: 2 * x + 0 * z.detach(), torch.zeros_like(x)).z.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_stacked_network():
    layer = Toy()
    z = stacked(layer, layer.z0, 3)
    assert torch.equal(z, layer(layer(layer(layer.z0))))
    with pytest.raises(InputError, match="0"):
        stacked(layer, layer.z0, 0)


# --- Warnings, solvers, statistics ------------------------------------------------------------


def test_poor_adjoint_warns():
    layer = Toy()
    deq = DEQ(tight["broyden"], partial(anderson, eps=1e-9))
    with pytest.warns(DEQWarning, match="raise b_thres"):
        gradients(loss_of(deq(layer, layer.z0, f_thres=200, b_thres=1).z), layer)


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
    deq = DEQ("broyden")
    assert deq.f_solver is deq.b_solver is broyden
    deq.f_solver = own  # the adjoint follows while it has no solver of its own
    assert deq.f_solver is deq.b_solver is own
    deq.b_solver = "fixed_point_iteration"
    assert deq.b_solver is fixed_point_iteration
    deq.b_solver = None
    assert deq.b_solver is own
    for assign in ("f_solver", "b_solver"):
        with pytest.raises(InputError, match=r"newton.*anderson, broyden"):
            setattr(deq, assign, "newton")
        with pytest.raises(InputError, match="newton"):
            DEQ(**{"f_solver": "anderson", assign: "newton"})
    assert deq.f_solver is own


def test_solver_attributes_of_a_model():
    class Model(SolverAttributes, nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = DEQ("anderson")

    model = Model()
    model.f_solver = "broyden"
    model.b_solver = own = partial(anderson, m=2)
    assert model.deq.f_solver is model.f_solver is broyden
    assert model.deq.b_solver is model.b_solver is own
    with pytest.raises(InputError, match="unknown"):
        model.f_solver = "unknown"
    assert model.f_solver is broyden


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
