"""Weight normalisation and variational dropout."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lib.errors import InputError
from lib.optimization import (
    VariationalAttnDropout,
    VariationalDropout,
    VariationalHidDropout,
    VariationalHidDropout2d,
    weight_norm,
)


def normalised(v, g, dim=0):
    """v g / ||v||, element by element of ``dim``."""
    out = torch.empty_like(v)
    for i in range(v.shape[dim]):
        v_i = v.select(dim, i)
        out.select(dim, i).copy_(v_i * g.flatten()[i] / v_i.square().sum().sqrt())
    return out


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (3, 1)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 1, bias=False), (6, 1, 1)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (3, 1, 1, 1)),
}


@pytest.fixture(params=MODULES)
def pair(request):
    torch.manual_seed(0)
    make, g_shape = MODULES[request.param]
    return make().double(), g_shape


def test_weight_is_v_g_over_norm(pair):
    module, g_shape = pair
    before = module.weight.detach().clone()
    names = [name for name, _ in module.named_parameters() if name != "weight"]
    returned, fn = weight_norm(module, ["weight"])
    assert returned is module
    # Other parameters keep their place; the new ones stand behind them, g before v.
    expected_names = [*names, "weight_g", "weight_v"]
    assert [name for name, _ in module.named_parameters()] == expected_names
    assert list(module.state_dict()) == expected_names
    assert module.weight_g.shape == g_shape
    torch.testing.assert_close(module.weight, before)
    with torch.no_grad():
        module.weight_g.mul_(torch.linspace(0.5, 2, g_shape[0]).double().view(g_shape))
        module.weight_v.add_(0.1)
    torch.testing.assert_close(module.weight, normalised(module.weight_v, module.weight_g))
    fn.reset(module)
    torch.testing.assert_close(module.weight, normalised(module.weight_v, module.weight_g))


@pytest.mark.parametrize("held", [False, True])
def test_gradients_equal_torch(pair, held):
    module, g_shape = pair
    other = parametrizations.weight_norm(copy.deepcopy(module), "weight")
    module, fn = weight_norm(module, ["weight"])
    original = other.parametrizations.weight
    with torch.no_grad():
        scale = torch.linspace(0.5, 2, g_shape[0]).double().view(g_shape)
        module.weight_g.mul_(scale)
        original.original0.mul_(scale)
    x = torch.randn(2, 4, 4, 4)[:, : module.weight_v.shape[1]].double()
    x = x[:, :, :, 0] if isinstance(module, nn.Conv1d) else x
    if held:
        fn.reset(module)
    for m in (module, other):
        m(x).square().sum().backward()
    torch.testing.assert_close(module.weight_g.grad, original.original0.grad)
    torch.testing.assert_close(module.weight_v.grad, original.original1.grad)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_dim(dim):
    torch.manual_seed(0)
    module, _ = weight_norm(nn.Linear(4, 3), ["weight"], dim=dim)
    assert module.weight_g.shape == ((3, 1) if dim == 0 else (1, 4))
    expected = torch.linalg.vector_norm(module.weight_v, dim=1 if dim == 0 else 0)
    torch.testing.assert_close(module.weight_g.flatten(), expected)
    with torch.no_grad():
        module.weight_g.mul_(3)
    expected = normalised(module.weight_v.detach(), module.weight_g.detach(), dim)
    torch.testing.assert_close(module.weight.detach(), expected)


def test_a_weight_of_one_dimension():
    layer = nn.LayerNorm(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 3.0]))
    expected = layer.weight.clone()
    layer, _ = weight_norm(layer, ["weight"])
    assert layer.weight_g.tolist() == [1, 2, 3]
    torch.testing.assert_close(layer.weight, expected)


def test_several_names():
    cell = nn.RNNCell(3, 3).double()
    before = {name: p.detach().clone() for name, p in cell.named_parameters()}
    weight_norm(cell, ["weight_ih", "weight_hh"])
    for name in ("weight_ih", "weight_hh"):
        torch.testing.assert_close(getattr(cell, name), before[name])
    with pytest.raises(InputError, match=r"RNNCell.*'kernel'"):
        weight_norm(cell, ["kernel"])


def test_reset_holds_one_tensor():
    module, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    assert module.weight is not module.weight
    fn.reset(module)
    assert module.weight is module.weight


def optimizer_step(module):
    module.weight_v.grad = torch.ones_like(module.weight_v)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def load_other_state(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def change_dtype(module):
    module.to(torch.float64)


def replace_parameter(module):
    module.weight_g = nn.Parameter(2 * module.weight_g.detach())


def write_in_place(module):
    with torch.no_grad():
        module.weight_v[0, 0] += 1


CHANGES = [optimizer_step, load_other_state, change_dtype, replace_parameter, write_in_place]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False])
def test_held_weight_is_never_stale(change, grad):
    torch.manual_seed(0)
    module, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    fn.reset(module)
    before = module.weight.detach().clone()
    change(module)
    with torch.set_grad_enabled(grad):
        found = module.weight
    assert found.dtype == module.weight_v.dtype
    torch.testing.assert_close(found, normalised(module.weight_v, module.weight_g))
    if change is not change_dtype:
        assert not torch.allclose(found, before)


def test_held_without_autograd_then_trained():
    module, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    with torch.no_grad():
        fn.reset(module)
    module(torch.randn(2, 4)).sum().backward()
    assert module.weight_v.grad is not None
    assert module.weight_g.grad is not None


def test_held_while_frozen_then_trained():
    module, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    module.requires_grad_(False)
    fn.reset(module)
    module.requires_grad_(True)
    module(torch.randn(2, 4)).sum().backward()
    assert module.weight_v.grad is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy])
@pytest.mark.parametrize("held", [False, True])
def test_copy(clone, held):
    module, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    if held:
        fn.reset(module)
    twin = clone(module)
    torch.testing.assert_close(twin.weight, module.weight)
    if clone is copy.deepcopy:
        with torch.no_grad():
            twin.weight_g.mul_(2)
        torch.testing.assert_close(twin.weight, 2 * module.weight)
        twin(torch.randn(2, 4)).sum().backward()
        assert twin.weight_g.grad is not None
        assert module.weight_g.grad is None


def test_state_dict_round_trip():
    first, fn = weight_norm(nn.Linear(4, 3), ["weight"])
    second, _ = weight_norm(nn.Linear(4, 3), ["weight"])
    fn.reset(first)
    assert set(first.state_dict()) == {"bias", "weight_g", "weight_v"}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, first.weight)


def test_repr_still_names_the_layer():
    assert "Linear(in_features=4" in repr(weight_norm(nn.Linear(4, 3), ["weight"])[0])


def test_other_modules_of_the_class_are_untouched():
    other = nn.Linear(4, 3)
    weight_norm(nn.Linear(4, 3), ["weight"])
    assert isinstance(other.weight, nn.Parameter)
    assert "weight" not in vars(nn.Linear)


# --- Dropout ----------------------------------------------------------------------------------


def values_of(mask):
    return set(mask.unique().tolist())


@pytest.mark.parametrize(("shape", "dim"), [((4, 7, 3), 3), ((2, 4, 7, 3), 4)])
def test_variational_dropout(shape, dim):
    torch.manual_seed(0)
    drop = VariationalDropout()
    x = torch.ones(shape, dtype=torch.float64)
    out = drop(x, 0.5, dim)
    assert values_of(out) == {0.0, 2.0}
    assert torch.equal(out, out[..., :1, :].expand(shape))  # one mask over time
    assert not torch.equal(out, drop(x, 0.5, dim))  # drawn anew
    assert drop(x, 0.0, dim) is x
    assert drop.eval()(x, 0.5, dim) is x


# Name: constructor, arguments of reset_mask, shape of the input, shape of the mask.
HELD = {
    "length first": (lambda p: VariationalHidDropout(p, True), (4, 5, 9), (4, 9, 5), (4, 1, 5)),
    "length last": (lambda p: VariationalHidDropout(p), (4, 5, 9), (4, 5, 9), (4, 5, 1)),
    "attention": (VariationalAttnDropout, (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5)),
    "spatial": (VariationalHidDropout2d, (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 1, 1)),
    "pixels": (
        lambda p: VariationalHidDropout2d(p, False),
        (2, 3, 4, 5),
        (2, 3, 4, 5),
        (2, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_held_masks(kind):
    torch.manual_seed(0)
    make, arguments, shape, mask_shape = HELD[kind]
    drop, x = make(0.4), torch.ones(shape, dtype=torch.float64)
    with pytest.raises(InputError, match="reset_mask"):
        drop(x)
    mask = drop.reset_mask(*arguments, dtype=torch.float64)
    assert mask.shape == mask_shape
    assert values_of(mask) == {0.0, 1 / 0.6}
    assert torch.equal(drop(x), mask.expand(shape))
    assert torch.equal(drop(2 * x), 2 * drop(x))  # the same mask until it is drawn again
    assert not torch.equal(mask, drop.reset_mask(*arguments, dtype=torch.float64))
    drop.eval()
    assert drop(x) is x


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_mean_of_masks_is_one(kind, p):
    """Four standard errors: an entry has the variance p / (1 - p)."""
    torch.manual_seed(0)
    make, arguments, _, _ = HELD[kind]
    drop, repeats = make(p), 400
    masks = torch.stack([drop.reset_mask(*arguments).clone() for _ in range(repeats)])
    error = (p / (1 - p) / masks.numel()) ** 0.5
    assert 4 * error < 0.3
    assert abs(masks.mean() - 1) < 4 * error
    assert abs((masks == 0).float().mean() - p) < 4 * (p * (1 - p) / masks.numel()) ** 0.5


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("setting", ["evaluation", "p = 0"])
def test_nothing_is_drawn_where_nothing_is_dropped(kind, setting):
    make, arguments, shape, _ = HELD[kind]
    drop = make(0.0) if setting == "p = 0" else make(0.5).eval()
    before = torch.get_rng_state()
    drop.reset_mask(*arguments)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert drop(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_between_does_not_leave_an_old_mask():
    drop = VariationalHidDropout(0.5)
    drop.reset_mask(4, 5)
    drop.eval()
    drop.reset_mask(2, 5)
    drop.train()
    with pytest.raises(InputError, match="reset_mask"):
        drop(torch.ones(2, 5, 3))


def test_length_does_not_shape_the_mask():
    drop = VariationalHidDropout(0.5, length_first=True)
    assert drop.reset_mask(2, 5, 3).shape == drop.reset_mask(2, 5).shape == (2, 1, 5)


def test_same_seed_same_mask():
    drop = VariationalAttnDropout(0.5)
    masks = []
    for _ in range(2):
        torch.manual_seed(4)
        masks.append(drop.reset_mask(2, 2, 3, 3))
    assert torch.equal(*masks)


def test_copies_and_pickles():
    drop = VariationalHidDropout(0.5)
    drop.reset_mask(2, 5)
    x = torch.ones(2, 5, 3)
    for twin in (copy.deepcopy(drop), pickle.loads(pickle.dumps(drop))):
        assert torch.equal(twin(x), drop(x))
    assert list(drop.state_dict()) == []


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        VariationalHidDropout,
        VariationalAttnDropout,
        VariationalHidDropout2d,
        lambda p: VariationalDropout()(torch.ones(1, 2, 3), p),
    ],
)
def test_probability_out_of_range(make, p):
    with pytest.raises(InputError, match="dropout"):
        make(p)


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 2), ((2, 3, 4), 4), ((2, 3, 4, 5), 3)])
def test_variational_dropout_dim_must_fit(shape, dim):
    with pytest.raises(InputError, match="dim"):
        VariationalDropout()(torch.ones(shape), 0.5, dim)
