"""Every gradient against dense solves and against autograd; what each refuses, keeps and costs."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lib.deq import DEQ
from lib.errors import InputError
from lib.gradients import GRADIENTS, Phantom, Shine, get_gradient
from lib.gradients.iterations import Unroll
from lib.solvers import ADJOINT_SOLVERS, anderson, broyden
from measures import saved_bytes
from problems import largest_relative_error
from toy_layers import ConvTanh, Toy, TwoScales, gradients, loss_of, unrolled_gradients

TIGHT = "broyden:eps=1e-13"
THRESHOLD = 300
LAYERS = {"toy": Toy, "rank 4": ConvTanh, "list": TwoScales}
by_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def found(
    layer: nn.Module, grad, *, f_solver=TIGHT, b_solver="gmres", f_thres=THRESHOLD, **options
):
    """Gradients of the layer's parameters through an equilibrium."""
    deq = DEQ(f_solver, b_solver, grad=grad)
    z = deq(layer, layer.z0, f_thres=f_thres, b_thres=THRESHOLD, **options).z
    return gradients(loss_of(z), layer)


def at_fixed_point(layer: nn.Module, steps) -> list[Tensor]:
    """Gradients through ``steps(z)`` from a fixed point found by 300 applications."""
    with torch.no_grad():
        z = layer.z0
        for _ in range(300):
            z = layer(z)
    return gradients(loss_of(steps(z)), layer)


def damped(layer: nn.Module, z, count: int, damping: float):
    for _ in range(count):
        new = layer(z)
        if isinstance(z, list):
            z = [damping * n + (1 - damping) * o for n, o in zip(new, z, strict=True)]
        else:
            z = damping * new + (1 - damping) * z
    return z


# ---- exact ones ------------------------------------------------------------------------------


@by_layer
@pytest.mark.parametrize("b_solver", ADJOINT_SOLVERS)
def test_implicit(layer, b_solver):
    layer = layer()
    error = largest_relative_error(
        found(layer, "ift", b_solver=f"{b_solver}:eps=1e-12"), unrolled_gradients(layer)
    )
    assert error <= 1e-8


@by_layer
@pytest.mark.parametrize("grad", ["unroll", "unroll:checkpointing=true"])
def test_unrolled_is_autograd(layer, grad):
    layer = layer()
    expected = gradients(loss_of(damped(layer, layer.z0, 9, 1.0)), layer)
    assert largest_relative_error(found(layer, grad, f_thres=9), expected) <= 1e-13


def test_unrolled_with_damping():
    layer = Toy()
    expected = gradients(loss_of(damped(layer, layer.z0, 7, 0.6)), layer)
    assert largest_relative_error(found(layer, "unroll:damping=0.6", f_thres=7), expected) <= 1e-13


# ---- one step and phantom --------------------------------------------------------------------


@by_layer
def test_one_step(layer):
    layer = layer()
    expected = at_fixed_point(layer, layer)
    assert largest_relative_error(found(layer, "jfb"), expected) <= 1e-8
    one = Phantom(steps=1, damping=1.0)
    for grad in (one, Phantom(steps=1, damping=1.0, form="neumann")):
        assert largest_relative_error(found(layer, grad), found(layer, "jfb")) <= 1e-13


@by_layer
@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (3, 0.8), (6, 0.3), (4, 1.0)])
def test_phantom(layer, steps, damping):
    layer = layer()
    unrolled = found(layer, Phantom(steps, damping))
    expected = at_fixed_point(layer, lambda z: damped(layer, z, steps, damping))
    assert largest_relative_error(unrolled, expected) <= 1e-8
    neumann = found(layer, Phantom(steps, damping, "neumann"))
    assert largest_relative_error(neumann, unrolled) <= 1e-8


def test_many_phantom_steps_are_exact():
    layer = ConvTanh()
    error = largest_relative_error(found(layer, Phantom(200, 1.0)), unrolled_gradients(layer))
    assert error <= 1e-12


def test_values_of_phantom():
    """Unrolled, the state is the last step's; the Neumann form and evaluation change nothing."""
    layer = Toy()
    for form in ("unrolled", "neumann"):
        deq = DEQ("anderson", grad=Phantom(3, 0.5, form))
        z = deq(layer, layer.z0, f_thres=4)
        expected = damped(layer, z.z_star, 3, 0.5) if form == "unrolled" else layer(z.z_star)
        torch.testing.assert_close(z.z, expected, rtol=0, atol=1e-15)
        with torch.no_grad():
            assert torch.equal(deq(layer, layer.z0, f_thres=4).z, z.z)
            assert torch.equal(deq(layer, layer.z0, f_thres=4, training=False).z, z.z_star)
        evaluated = deq(layer, layer.z0, f_thres=4, training=False)
        assert torch.equal(evaluated.z, z.z_star)
        assert (
            largest_relative_error(
                gradients(loss_of(evaluated.z), layer, retain_graph=True),
                gradients(loss_of(evaluated.z), layer),
            )
            == 0
        )


# ---- SHINE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", ",damping=0.7", ",memory=40"])
def test_shine_uses_the_transposed_inverse(options):
    """y = -H'g against H written out, from Broyden's own updates."""
    layer = Toy()
    deq = DEQ("broyden:eps=1e-3" + options, grad=Shine(limit=math.inf))
    solution = deq(layer, layer.z0, f_thres=30)
    grad = torch.ones_like(solution.z)
    (found,) = torch.autograd.grad(solution.z, layer.x, grad)

    points = []

    def f(z):
        points.append(z)
        return layer(z).detach()

    deq.f_solver(f, layer.z0, threshold=30)
    y = torch.stack([_adjoint(layer, b, points) for b in range(3)])
    (expected,) = torch.autograd.grad(layer(solution.z_star), layer.x, y)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def _adjoint(layer, sample: int, points: list[Tensor]) -> Tensor:
    """-H'1 of one sample, H by dense updates up to the point of the lowest residual."""
    gs = [(layer(z) - z).detach() for z in points]
    norms = [(g.norm() / (g + z).norm()).item() for g, z in zip(gs, points, strict=True)]
    inverse = -torch.eye(6, dtype=torch.float64)
    for k in range(norms.index(min(norms))):
        s, y = (seq[k + 1][sample] - seq[k][sample] for seq in (points, gs))
        image = inverse @ y
        inverse = inverse + torch.outer(s - image, inverse.T @ s) / (s @ image)
    return -inverse.T @ torch.ones(6, dtype=torch.float64)


def test_shine_falls_back_per_sample():
    layer = Toy()
    never = found(layer, Shine(limit=1e-9))
    assert largest_relative_error(never, found(layer, "jfb")) <= 1e-12
    grad = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()

    def of_x(g):
        z = DEQ(TIGHT, grad=g)(layer, layer.z0, f_thres=30).z
        return torch.autograd.grad(z, layer.x, grad)[0]

    one, shared = of_x("jfb"), of_x(Shine(math.inf))
    fell_before, seen = [True] * 3, set()
    for limit in torch.linspace(0.9, 1.6, 50).tolist():
        some = of_x(Shine(limit))
        fell = [torch.allclose(some[b], one[b], rtol=0, atol=1e-12) for b in range(3)]
        kept = [torch.allclose(some[b], shared[b], rtol=0, atol=1e-12) for b in range(3)]
        assert fell == [not k for k in kept]
        assert all(before or not now for before, now in zip(fell_before, fell, strict=True))
        fell_before = fell
        seen.add(sum(fell))
    assert {0, 3} < seen  # some samples fell and others did not


def test_shine_refined():
    layer = ConvTanh()
    exact = unrolled_gradients(layer)
    errors = [
        largest_relative_error(
            found(layer, f"shine:refine={k}", b_solver="broyden:eps=1e-12"), exact
        )
        for k in (1, 3, 30)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3
    assert errors[0] < largest_relative_error(found(layer, "shine"), exact)


# ---- several states --------------------------------------------------------------------------

GRADS = ["ift", "shine", "jfb", "phantom", "phantom:form=neumann", "reversible", "unroll"]
by_grad = pytest.mark.parametrize("grad", GRADS)


@by_grad
def test_states_on_the_way(grad):
    layer = Toy()
    deq = DEQ("broyden:eps=1e-10", grad=grad)
    solution = deq(layer, layer.z0, f_thres=12, indexing=[2, 4])
    alone = deq(layer, layer.z0, f_thres=12)
    assert len(solution.states) == 3
    assert solution.states[-1] is solution.z
    assert torch.equal(solution.z, alone.z)
    assert not torch.equal(*solution.states[:2])
    # The last one's gradient is what it is without the others.
    grads = gradients(loss_of(solution.states[-1]), layer, retain_graph=True)
    assert largest_relative_error(grads, gradients(loss_of(alone.z), layer)) <= 1e-12
    # The others have one of their own, and all of them together add up.
    apart = [gradients(loss_of(z), layer, retain_graph=True) for z in solution.states]
    together = gradients(sum(loss_of(z) for z in solution.states), layer)
    assert largest_relative_error(together, [sum(g) for g in zip(*apart, strict=True)]) <= 1e-12
    assert all(g.abs().sum() > 0 for g in apart[0])


def test_states_are_the_points_of_the_solver():
    layer, points = Toy(), []

    def f(z):
        points.append(z.detach().clone())
        return layer(z)

    with torch.no_grad():
        DEQ("anderson")(f, layer.z0, f_thres=8)
    states = DEQ("anderson", grad="jfb")(layer, layer.z0, f_thres=8, indexing=[5, 1]).states
    for state, i in zip(states, (5, 1), strict=False):
        assert torch.equal(state, layer(points[i]))
    evaluated = DEQ("anderson")(layer, layer.z0, f_thres=8, indexing=[5, 1], training=False)
    for state, i in zip(evaluated.states, (5, 1), strict=False):
        torch.testing.assert_close(state, points[i], rtol=0, atol=1e-15)
        assert state.requires_grad
    assert torch.equal(evaluated.states[-1], evaluated.z_star)


@by_grad
def test_states_beyond_the_end(grad):
    """The solver converges before the last of the chosen steps: z stands in its place."""
    layer = Toy()
    deq = DEQ("broyden:eps=1e-2", "gmres:eps=1e-12", grad=grad)
    # (The iterations run to their threshold.)
    solution = deq(layer, layer.z0, f_thres=20, indexing=[1, 60])
    assert len(solution.states) == 3
    assert solution.states[2] is solution.z
    assert torch.equal(solution.states[1], solution.z)
    grads = gradients(loss_of(solution.states[1]), layer)
    alone = deq(layer, layer.z0, f_thres=20).z
    assert largest_relative_error(grads, gradients(loss_of(alone), layer)) <= 1e-12


def test_states_of_a_list():
    layer = TwoScales()
    states = DEQ("anderson")(layer, layer.z0, f_thres=8, indexing=[3]).states
    assert [[tuple(t.shape) for t in state] for state in states] == [
        [(2, 2, 4, 4), (2, 3, 2, 2)]
    ] * 2


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_states_that_do_not_exist(number):
    with pytest.raises(InputError, match="indexing"):
        DEQ()(torch.tanh, torch.zeros(1, 2), indexing=[number])


# ---- names, refusals, cost -------------------------------------------------------------------


def test_names_and_options():
    assert get_gradient("phantom:steps=3,damping=0.8") == Phantom(3, 0.8)
    assert get_gradient("unroll:checkpointing=true") == Unroll(checkpointing=True)
    assert get_gradient(own := Shine(refine=2)) is own
    assert {name: get_gradient(name) for name in GRADIENTS} == {
        name: kind() for name, kind in GRADIENTS.items()
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ghost", "ift, jfb, phantom, reversible, shine, unroll"),
        ("phantom:step=3", "did you mean steps"),
        ("phantom:steps=0", "steps is 0"),
        ("phantom:damping=1.5", "damping is 1.5"),
        ("phantom:form=series", "'unrolled' or 'neumann'"),
        ("phantom:steps", "not option=value"),
        ("phantom:steps=2,steps=3", "twice"),
        ("reversible:damping=1", "between 0 and 1"),
        ("shine:refine=-1", "refine is -1"),
        ("shine:limit=0", "limit is 0"),
        ("unroll:checkpointing=2", "True or False"),
        ("jfb:steps=1", "has no option steps"),
        (None, "name or a callable"),
    ],
)
def test_what_is_refused(text, named):
    with pytest.raises(InputError, match=named) as caught:
        get_gradient(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "solver",
    ["anderson", "newton_krylov", "fixed_point_iteration", "broyden:stop=sample", torch.cos],
)
def test_shine_needs_broyden(solver):
    with pytest.raises(InputError, match="choose f_solver broyden, or grad ift") as caught:
        DEQ(solver, grad="shine")
    assert "\n" not in str(caught.value)
    deq = DEQ("broyden", grad="shine")
    with pytest.raises(InputError, match="choose f_solver broyden"):
        deq.f_solver = solver
    assert deq.f_solver is broyden  # nothing has changed
    deq = DEQ(partial(anderson, m=3))
    with pytest.raises(InputError, match="choose f_solver broyden"):
        deq.grad = "shine"
    assert deq.grad == get_gradient("ift")


class Layer(nn.Module):
    """tanh(w z + x) in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.x = nn.Parameter(torch.rand(8)), torch.randn(4, 8)
        self.z0 = torch.zeros(4, 8)

    def forward(self, z):
        return torch.tanh(0.6 * self.weight * z + self.x)


@by_grad
@pytest.mark.parametrize("jac_vecs", [0, 1])
def test_saved_bytes_do_not_grow_with_iterations(grad, jac_vecs):
    layer = Layer()
    deq = DEQ("broyden:eps=0.0", grad=grad)
    sizes = [
        saved_bytes(lambda n=n: deq(layer, layer.z0, f_thres=n, jac_vecs=jac_vecs))
        for n in (6, 12, 24)
    ]
    grows = grad == "unroll"
    assert (sizes[0] < sizes[1] < sizes[2]) if grows else len(set(sizes)) == 1
    assert (sizes[0] > 0) == (grad != "reversible" or jac_vecs > 0)


@by_grad
def test_jacobian_loss_trains_along(grad):
    """The loss and the Jacobian loss at z*, each with its own gradient."""
    layer = Toy()
    deq = DEQ(TIGHT, "gmres:eps=1e-12", grad=grad)

    def solve(**options):
        torch.manual_seed(3)
        return deq(layer, layer.z0, f_thres=26, b_thres=100, **options)

    both = solve(jac_vecs=2)
    assert both.jac_loss.item() > 0
    total = gradients(loss_of(both.z) + 0.3 * both.jac_loss, layer, materialize_grads=True)
    alone = gradients(loss_of(solve().z), layer)
    regular = gradients(solve(jac_vecs=2).jac_loss, layer, materialize_grads=True)
    expected = [a + 0.3 * b for a, b in zip(alone, regular, strict=True)]
    assert largest_relative_error(total, expected) <= 1e-10


@by_grad
def test_backward_evaluations(grad):
    """Which gradients solve backward at all."""
    layer = Toy()
    deq = DEQ("broyden", grad=grad)
    loss_of(deq(layer, layer.z0, f_thres=10).z).backward()
    assert deq.stats.forward.solves == 1
    assert deq.stats.backward.solves == (grad == "ift")


@by_grad
def test_under_autocast(grad):
    """In bfloat16 a gradient has the dtype of the state, and is that in float32 to its rounding."""
    layer = Toy(12).float()
    layer.z0 = layer.z0.float()

    def gradient():
        z = DEQ("broyden", grad=grad)(layer, layer.z0, f_thres=10).z
        assert z.dtype == torch.float32
        return gradients(loss_of(z), layer)

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        low = gradient()
    # The inverse that shine shares comes from the few steps that were left for float32.
    assert largest_relative_error(low, expected) < (0.25 if grad == "shine" else 0.1)


@by_grad
def test_float32(grad):
    layer = Toy().float()
    layer.z0 = layer.z0.float()
    double = Toy()

    def gradient(layer):
        return gradients(loss_of(DEQ("broyden", grad=grad)(layer, layer.z0, f_thres=8).z), layer)

    expected = [g.float() for g in gradient(double)]
    assert largest_relative_error(gradient(layer), expected) < 1e-3
