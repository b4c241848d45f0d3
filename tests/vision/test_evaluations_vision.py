"""What an evaluation of f costs and in which number format it is: bfloat16, compiled, plain."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.errors import InputError
from lib.graphs import _try_compiler
from lib.layer_utils import list2vec
from lib.solvers.precision import autocast
from mdeq_vision import layer
from mdeq_vision.blocks import doubled
from mdeq_vision.summary import model_summary
from reference_mdeq import resize_nearest
from small_vision import (
    EQUILIBRIUM,
    NETS,
    STACKED,
    build,
    fill,
    images,
    relative_error,
    tiny_config,
)

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")  # so few iterations
CPU = torch.device("cpu")
BF16, FLOAT = torch.bfloat16, torch.float32
SETTINGS = {"WNORM": True, "DROPOUT": 0.2, "NUM_BLOCKS": [2, 1, 1]}


def small(kind="cls", branches=3, **changes):
    """A model in float32."""
    settings = (SETTINGS if branches == 3 else {}) | changes
    model = NETS[kind](tiny_config(branches, **settings))
    fill(model)
    return model


def inputs(model, *size, batch=2):
    """An injection and states of three branches."""
    sizes = layer.branch_sizes(*size, len(model.channels))
    generator = torch.Generator().manual_seed(0)
    z = [
        torch.randn(batch, c, *s, generator=generator)
        for c, s in zip(model.channels, sizes, strict=True)
    ]
    return torch.rand(batch, model.channels[0], *size, generator=generator), z


# ---- upsampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (8, 5), (7, 5), (1, 1), (2, 1)])
def test_doubled(size):
    """Pixel (i, j) is (i // 2, j // 2) of the lower resolution, and its gradient goes there."""
    x = images(-(-size[0] // 2), -(-size[1] // 2)).requires_grad_()
    twin, g = x.detach().clone().requires_grad_(), images(*size, seed=1)
    found, expected = doubled(x, size), resize_nearest(twin, 2, size)
    assert torch.equal(found, expected)
    found.backward(g)
    expected.backward(g)
    assert torch.allclose(x.grad, twin.grad, rtol=0, atol=1e-14)


def test_doubling_again_is_resizing_by_four():
    x = images(3, 2)
    assert torch.equal(doubled(doubled(x, (5, 4)), (9, 7)), resize_nearest(x, 4, (9, 7)))


# ---- inputs stay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_that_f_is_given_is_overwritten(branches, grad):
    model = small(branches=branches)
    x, z = inputs(model, 9, 8)
    before = [t.clone() for t in (x, *z)]
    with torch.set_grad_enabled(grad):
        f = model.fullstage.prepare(x, z)
        first, second = f(z), f(z)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *z), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- bfloat16 ------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts the float32 tensors that are cast to bfloat16, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == BF16 != args[0].dtype:
            self.shapes.append(tuple(args[0].shape))
        return out


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_cast_once_per_forward(training):
    model, found = small(NUM_CHANNELS=[6, 10, 14]).train(training), []
    weights = {tuple(p.shape) for p in model.fullstage.parameters()}
    for f_thres in (3, 9):
        with Casts() as casts, torch.no_grad(), autocast("bf16", CPU):
            model(images(8, 8).float(), EQUILIBRIUM, f_thres=f_thres)
        found.append(sum(shape in weights for shape in casts.shapes))
    print(f"{found} casts")
    # weight_g and weight_v are one weight.
    norms = sum(name.endswith("_g") for name, _ in model.fullstage.named_parameters())
    n = sum(1 for _ in model.fullstage.parameters()) - norms
    assert found[0] == found[1]
    assert n <= found[0] <= n + 12  # the stem and the head have weights of some of these shapes


def test_bf16_is_near_and_the_state_stays_float32():
    model = small()
    x, z = inputs(model, 9, 8)
    torch.manual_seed(0)
    expected = model.fullstage.prepare(x, z)(z)
    with autocast("bf16", CPU):
        torch.manual_seed(0)
        f = model.fullstage.prepare(x, z)
        found = f(z)
    assert {t.dtype for t in found} == {FLOAT}
    error = relative_error(list2vec(found), list2vec(expected))
    print(f"relative error {error:.2g}")
    assert 1e-4 < error < 0.03  # eight bits, over some ten operations


def test_in_full_precision_where_autocast_is_off():
    """Bit for bit the f of a forward in float32, also while autocast is on around it."""
    model = small()
    x, z = inputs(model, 9, 8)
    torch.manual_seed(0)
    expected = model.fullstage.prepare(x, z)(z)
    with autocast("bf16", CPU):
        torch.manual_seed(0)
        f = model.fullstage.prepare(x, z)
        with torch.autocast("cpu", enabled=False):
            inside = f(z)
    outside = f(z)
    for a, b, c in zip(expected, inside, outside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("low", [True, False])
def test_gradients_reach_the_parameters_in_both_formats(low):
    """Those of bfloat16 point where those of float32 do."""
    model, found = small(), {}
    x, z = inputs(model, 9, 8)
    for amp in ("none", "bf16"):
        torch.manual_seed(0)
        with autocast(amp, CPU):
            f = model.fullstage.prepare(x, z)
            with torch.autocast("cpu", BF16, enabled=low and amp == "bf16"):
                list2vec(f(z)).square().sum().backward()
        found[amp] = {name: p.grad for name, p in model.fullstage.named_parameters()}
        model.zero_grad()
    for name, expected in found["none"].items():
        grad = found["bf16"][name]
        assert grad.dtype == FLOAT, name
        if not low:
            assert torch.equal(grad, expected), name
    vectors = [torch.cat([g.flatten() for g in grads.values()]) for grads in found.values()]
    assert torch.cosine_similarity(*vectors, dim=0) > 0.98


@pytest.mark.parametrize("kind", ["cls", "seg"])
@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
def test_states_under_autocast_are_float32(kind, phase, monkeypatch):
    model, seen = small(kind), []
    monkeypatch.setattr(model, "head", lambda z: seen.extend(z) or z[0].mean())
    with autocast("bf16", CPU):
        model(images(9, 8).float(), phase, f_thres=3, compute_jac_loss=False)
    assert {t.dtype for t in seen} == {FLOAT}


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """Trace as torch.compile does, but generate no code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield from fresh()


@pytest.fixture
def generated():
    """torch.compile as it is."""
    yield from fresh()


def fresh():
    caches = (layer._compiled, _try_compiler)
    for cache in caches:
        cache.cache_clear()
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters["stats"]
    for cache in caches:
        cache.cache_clear()
    torch._dynamo.reset()


def three_steps(model, amp="none", stats=None):
    """Three updates with Jacobian loss, then an evaluation: outputs, and graphs after each."""
    torch.manual_seed(0)
    optimizer, outputs, graphs = torch.optim.SGD(model.parameters(), lr=0.01), [], []
    for step in range(3):
        with autocast(amp, CPU):
            output, jac_loss, _ = model(images(9, 8, seed=step).float(), f_thres=5, b_thres=5)
        optimizer.zero_grad()
        (output.float().square().mean() + jac_loss.mean()).backward()
        assert jac_loss > 0
        optimizer.step()
        outputs.append(output.detach().float())
        graphs.append(stats["unique_graphs"] if stats else 0)
    model.eval()
    with torch.no_grad():
        outputs.append(model(images(9, 8).float(), f_thres=5)[0])
    return outputs, graphs


@pytest.mark.parametrize("amp", [pytest.param("none", marks=pytest.mark.slow), "bf16"])
def test_three_steps_need_one_compilation(traced, amp):
    expected, before = three_steps(small("seg"), amp)[0], traced["unique_graphs"]
    found, graphs = three_steps(small("seg", COMPILE=True), amp, traced)
    assert graphs[0] > before
    assert graphs[0] == graphs[-1]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_autograd_and_copies_go_past_the_compiler(traced):
    twin, before = copy.deepcopy(small(COMPILE=True)), traced["unique_graphs"]
    x, z = inputs(twin, 9, 8)
    list2vec(twin.fullstage.prepare(x, z)(z)).sum().backward()
    assert traced["unique_graphs"] == before
    assert all(p.grad is not None for p in twin.fullstage.parameters())


def test_a_compiler_that_does_not_work(traced, monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(InputError, match=r"^COMPILE: .*no compiler") as caught, torch.no_grad():
        small(COMPILE=True)(images(8, 8).float(), f_thres=3)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_generated_code(generated):
    changes = {"NUM_BLOCKS": [1, 1]}
    expected, _ = three_steps(small(branches=2, **changes))
    found, graphs = three_steps(small(branches=2, COMPILE=True, **changes), stats=generated)
    assert graphs[0] == graphs[-1] > 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-3  # rounding, through three updates


# ---- how much is computed ------------------------------------------------------------------------


def test_multiply_adds_of_f():
    """Counted by hand: two convolutions per branch, the fusion, and the one after it."""
    cfg, model = tiny_config(2, WNORM=True), build("cls", 2, WNORM=True)
    high, low, pixels = 4, 6, 8 * 8
    blocks = 2 * 9 * 2 * (high**2 * pixels + low**2 * pixels // 4)
    fusion = low * high * pixels // 4 + 9 * high * low * pixels // 4
    after = high**2 * pixels + low**2 * pixels // 4
    text = model_summary(cfg, model, (8, 8))
    assert f"f {blocks + fusion + after:,} per application" in text
    assert math.prod(model.classifier.weight.shape) == 35
    assert f"Total params: {sum(p.numel() for p in model.parameters()):,}" in text
