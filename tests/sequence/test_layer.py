"""The layer f: its formula, both forms of its attention, number formats, some samples alone."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deq_sequence.layer import (
    FeedForwardTensors,
    TransformerLayer,
    evaluate,
    layer_norm,
    relative_shift,
    visible_keys,
    working_dtype,
)
from lib.jacobian import jac_loss_estimate
from measures import Gathers

BATCH, QLEN, HEADS, D, INNER = 2, 4, 2, 8, 12
VARIANTS = {
    "post-LN": {},
    "pre-LN": {"pre_lnorm": True, "wnorm": True},
    "local": {"local_size": 3},
    "dropout": {"dropout": 0.3},
    "dropatt": {"dropatt": 0.3, "dropout": 0.2, "pre_lnorm": True},
    "own": {"inject": "own", "local_size": 3, "dropout": 0.3},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_memory = pytest.mark.parametrize("mlen", [0, 5])


def build(variant="post-LN", mlen=5, dtype=torch.float64, batch=BATCH, **changes):
    """A layer with weights that matter; us (B, K, 3d), memory, positions; a state."""
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "dropatt": 0.0} | VARIANTS[variant] | changes
    layer = TransformerLayer(HEADS, D, D // HEADS, INNER, **settings).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    us = torch.randn(batch, mlen + QLEN, 3 * D, dtype=dtype, requires_grad=True)
    memory = torch.randn(batch, mlen, D, dtype=dtype)
    positions = torch.randn(1, mlen + QLEN, D, dtype=dtype)
    return layer, (us, memory, positions), torch.randn(batch, QLEN, D, dtype=dtype)


def by_the_book(layer, inputs, z) -> Tensor:
    """f(z) in the order of its definition, with the masks that the layer holds."""
    us, memory, positions = inputs
    attention, ff, mlen = layer.dec_attn, layer.pos_ff, memory.shape[1]
    qlen, klen, d_head = z.shape[1], us.shape[1], D // HEADS

    def mask(drop):
        return 1.0 if drop.mask is None else drop.mask

    def heads(x):  # (B, n, d) -> (B, h, n, d_head)
        return x.unflatten(-1, (HEADS, d_head)).transpose(1, 2)

    c = torch.cat([memory, z], 1)
    c = layer_norm(c) if layer.pre_lnorm else c
    own = z
    if attention.inject == "own":
        own, us = us[:, mlen:, 2 * D :], us * (torch.arange(3 * D) < D)  # queries alone
    q, k, v = (c @ attention.qkv_net.weight.squeeze(2).T + us).split(D, 2)
    q, k, v = heads(q[:, mlen:]), heads(k), heads(v)
    r = heads(positions @ attention.r_net.weight.squeeze(2).T)[0]  # (h, K, d_head)
    i, j = torch.arange(qlen)[:, None], torch.arange(klen)
    row = (klen - 1 - (i + mlen - j)).clamp(max=klen - 1)  # of the distance i + M - j
    content = (q + attention.r_w_bias[:, None]) @ k.mT
    position = torch.einsum("bhid,hijd->bhij", q + attention.r_r_bias[:, None], r[:, row])
    score = (content + position) / math.sqrt(d_head)
    hidden = ~visible_keys(qlen, mlen, attention.local_size)
    if attention.inject == "own":  # a position does not see itself, if it sees others
        hidden |= (j == i + mlen) & (i + mlen > 0)
    weights = F.softmax(score.masked_fill(hidden, -torch.inf), -1) * mask(attention.dropatt)
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = out @ attention.o_net.weight.squeeze(2).T + attention.o_net.bias
    y = layer_norm(out * mask(attention.drop) + own)
    inner = F.relu(y @ ff.ff1_net.weight.T + ff.ff1_net.bias) * mask(ff.drop1)
    out = (inner @ ff.ff2_net.weight.T + ff.ff2_net.bias) * mask(ff.drop2) + y
    return out if layer.pre_lnorm else layer_norm(out)


def fused(layer, inputs):
    """f with PyTorch's attention, as it is computed on a GPU."""
    attention = layer.dec_attn.prepare(*inputs)(torch.float64)
    feed_forward = layer.pos_ff.prepare(BATCH, dtype=torch.float64)(torch.float64)
    return lambda z: evaluate(z, attention, feed_forward, layer.pre_lnorm, True)


# --- The formula ------------------------------------------------------------------------------


@every_memory
@every_variant
@pytest.mark.parametrize("form", ["f", "plain", "fused"])
def test_value_and_gradients_are_those_of_the_formula(variant, mlen, form):
    if form == "fused" and "dropatt" in variant:
        pytest.skip("fused kernels know no mask of attention weights")
    layer, inputs, z = build(variant, mlen)
    z.requires_grad_()
    f = layer.prepare(*inputs)
    f = {"f": f, "plain": f.plain, "fused": None}[form] or fused(layer, inputs)
    found, expected = f(z), by_the_book(layer, inputs, z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(f(z), expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(z)
    leaves = [z, inputs[0], *layer.parameters()]
    found = torch.autograd.grad(found, leaves, direction)
    expected = torch.autograd.grad(expected, leaves, direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert b.abs().max() > 0


@every_variant
def test_plain_has_second_derivatives(variant):
    """The Jacobian loss trains every parameter as the formula says."""
    layer, inputs, z = build(variant)
    z.requires_grad_()
    f = layer.prepare(*inputs)
    gradients = []
    for form in (f.plain, lambda z: by_the_book(layer, inputs, z)):
        torch.manual_seed(3)
        loss = jac_loss_estimate(form(z), z, vecs=2)
        leaves = [inputs[0], *layer.parameters()]
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("qlen", "mlen"), [(1, 0), (1, 4), (5, 0), (4, 3)])
def test_relative_shift(qlen, mlen):
    klen = mlen + qlen
    x = torch.randn(2, 3, qlen, klen + 1)
    found = relative_shift(x)
    for i in range(qlen):
        for j in range(i + mlen + 1):  # keys in the future are arbitrary
            assert torch.equal(found[..., i, j], x[..., i, j + qlen - 1 - i])
    assert found.shape == (2, 3, qlen, klen)
    assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # no copy


def test_f_keeps_its_masks_and_a_new_one_draws_others():
    layer, inputs, z = build("dropatt")
    f = layer.prepare(*inputs)
    assert torch.equal(f(z), f(z))
    assert not torch.equal(f(z), layer.prepare(*inputs)(z))
    f = layer.eval().prepare(*inputs)
    assert torch.equal(f(z), layer.prepare(*inputs)(z))


# --- Number formats ---------------------------------------------------------------------------


def bf16(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def test_working_dtype():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert working_dtype(single) == torch.float32
    with bf16():
        assert working_dtype(single) == torch.bfloat16
        assert working_dtype(double) == torch.float64
        with bf16(False):
            assert working_dtype(single) == torch.float32


class Casts(TorchDispatchMode):
    """The shapes of all tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and "dtype" in kwargs:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recording", [False, True])
def test_bf16_casts_weights_once_and_then_activations_alone(variant, recording):
    layer, inputs, z = build(variant, dtype=torch.float32)
    with bf16(), torch.set_grad_enabled(recording):
        with Casts() as first:
            f = layer.prepare(*inputs)
        for form in (f, f.plain):
            with Casts() as later:
                form(z)
            # To bfloat16: what enters the two blocks. Their results are added to the state.
            assert later.shapes == [(BATCH, QLEN, D)] * 2
    weights = [tuple(p.shape) for p in (layer.pos_ff.ff1_net.weight, layer.pos_ff.ff2_net.weight)]
    for shape in (*weights, (3 * D, D), (D, D)):
        assert first.shapes.count(shape) == 1


@every_variant
def test_float32_casts_nothing(variant):
    layer, inputs, z = build(variant, dtype=torch.float32)
    with Casts() as casts:
        layer.prepare(*inputs)(z)
    # (L, K), where distances are compared, is no number of the computation.
    assert [shape for shape in casts.shapes if shape != (QLEN,)] == []


@every_variant
def test_full_precision_within_autocast(variant):
    """A solve may end in float32: the same f, with autocast off."""
    layer, inputs, z = build(variant, dtype=torch.float32)
    with bf16():
        torch.manual_seed(5)
        f = layer.prepare(*inputs)
        rough = f(z)
        with bf16(False):
            exact = f(z)
    torch.manual_seed(5)
    assert torch.equal(exact, layer.prepare(*inputs)(z))
    assert rough.dtype == exact.dtype == torch.float32
    difference = (rough - exact).abs().max()
    assert 0 < difference < 0.1  # eight bits of values up to 3, through three products


def test_it_holds_its_tensors_in_one_dtype():
    """A solve in stages must not hold its weights twice: the layer's own and a rounded copy."""
    layer, inputs, z = build("pre-LN", dtype=torch.float32)

    def held():
        """Dtypes of the weights that some f of this layer holds."""
        kinds = (x for x in gc.get_objects() if type(x) is FeedForwardTensors)
        return [x.weight1.dtype for x in kinds if x.weight1.shape == (INNER, D)]

    gc.collect()
    assert held() == []
    with bf16(), torch.no_grad():
        f = layer.prepare(*inputs)
        rough = f(z)
        assert held() == [torch.bfloat16]
        with bf16(False):
            f(z)
        assert held() == [torch.float32]
        assert torch.equal(f(z), rough)
        assert held() == [torch.bfloat16]
        with bf16(False), torch.enable_grad():
            f(z)  # as for an adjoint, which keeps only the graph
        assert held() == []


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_in_the_format_of_the_evaluation(enabled):
    """Also where the first use, which makes the tensors, is a solver's without autograd."""
    layer, inputs, z = build("pre-LN", dtype=torch.float32)
    leaves = [inputs[0], *layer.parameters()]
    with bf16():
        f = layer.prepare(*inputs)
        with torch.no_grad():
            f(z)
            with bf16(False):
                f(z)
        with bf16(enabled):
            loss = f(z).square().sum()
    found = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(layer.prepare(*inputs)(z).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        if not enabled:
            assert torch.equal(a, b)
        assert (a - b).norm() <= 0.1 * b.norm()


def test_a_forward_leaves_nothing_to_the_garbage_collector():
    """The tensors of a forward go with its f: no cycle keeps them."""
    layer, inputs, z = build(dtype=torch.float32)
    gc.disable()
    try:
        f = layer.prepare(*inputs)
        f(z) + f.plain(z)
        some = f.select(torch.tensor([1])).select(torch.tensor([0]))
        some(z[1:]) + some.plain(z[1:])
        gone = [weakref.ref(f), weakref.ref(some)]
        del f, some
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


# --- Some samples alone -----------------------------------------------------------------------

ROWS = {
    "one": [3],
    "some": [0, 2, 3],
    "in another order": [4, 1],
    "all": [0, 1, 2, 3, 4],
    "all, in another order": [2, 4, 0, 1, 3],
}
every_rows = pytest.mark.parametrize("rows", [torch.tensor(r) for r in ROWS.values()], ids=ROWS)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def build_batch(variant="post-LN", mlen=5, dtype=torch.float64):
    """As ``build``: five samples, and all masks."""
    return build(variant, mlen, dtype, batch=5, dropout=0.3, dropatt=0.3)


@every_rows
@every_memory
@every_variant
def test_selected_samples(variant, mlen, rows):
    layer, inputs, z = build_batch(variant, mlen)
    f = layer.prepare(*inputs)
    expected, some = f(z), f.select(rows)
    close(some(z[rows]), expected[rows])
    close(some.plain(z[rows]), expected[rows])
    with torch.no_grad():
        close(f.select(rows)(z[rows]), expected[rows])
    assert torch.equal(f(z), expected)
    f = layer.eval().prepare(*inputs)  # without masks
    close(f.select(rows)(z[rows]), f(z)[rows])


@every_rows
def test_selected_samples_with_fused_attention(rows):
    layer, inputs, z = build("dropout", batch=5)
    attention = layer.dec_attn.prepare(*inputs)(torch.float64)
    feed_forward = layer.pos_ff.prepare(5, dtype=torch.float64)(torch.float64)
    expected = evaluate(z, attention, feed_forward, False, True)[rows]
    close(
        evaluate(z[rows], attention.select(rows), feed_forward.select(rows), False, True), expected
    )


@every_memory
@every_variant
def test_selections_of_selections(variant, mlen):
    """Rows count within the selection, whether that was evaluated before or not."""
    layer, inputs, z = build_batch(variant, mlen)
    f = layer.prepare(*inputs)
    some, own, expected = f, torch.arange(5), f(z)
    for rows in ([4, 1, 3, 0], [1, 2, 3], [2, 0], [1]):
        some, own = some.select(torch.tensor(rows)), own[rows]
        if len(own) != 3:
            close(some(z[own]), expected[own])
            close(some.plain(z[own]), expected[own])
    assert own.tolist() == [1]


@every_rows
@every_variant
@pytest.mark.parametrize("form", ["f", "plain"])
def test_gradients_of_selected_samples(variant, rows, form):
    """First and second ones, of z and of all that is trained; the first use is a solver's."""
    layer, inputs, z = build_batch(variant)
    f = layer.prepare(*inputs)
    some, direction = f.select(rows), torch.randn(len(rows), QLEN, D, dtype=z.dtype)
    with torch.no_grad():
        some(z[rows])
    if form == "plain":
        f, some = f.plain, some.plain
    z.requires_grad_()
    leaves, gradients = [z, inputs[0], *layer.parameters()], []
    for selected in (some(z[rows]), f(z)[rows]):
        first = torch.autograd.grad(selected, leaves, direction, create_graph=True)
        loss = first[0].square().sum()
        options = {"retain_graph": True, "materialize_grads": True}  # both have a part in common
        second = torch.autograd.grad(loss, leaves, **options)
        gradients.append(first + second)
    for a, b in zip(*gradients, strict=True):
        close(a, b, rtol=1e-10)
    assert all(g.abs().max() > 0 for g in first + second[:2])


@every_memory
@every_variant
def test_bf16_of_selected_samples(variant, mlen):
    layer, inputs, z = build_batch(variant, mlen, torch.float32)
    rows = torch.tensor([4, 0, 3])
    with bf16(), torch.no_grad():
        f = layer.prepare(*inputs)
        some = f.select(rows)
        with bf16(False):
            exact = some(z[rows])
            close(exact, f(z)[rows], atol=1e-5)
        for found, expected in ((some, f), (some.plain, f.plain)):
            found = found(z[rows])
            assert found.dtype == torch.float32
            close(found, expected(z)[rows], atol=0.05)  # eight bits of values up to 3
            assert (found - exact).abs().max() > 1e-3


def test_samples_are_gathered_once_and_weights_never():
    """At the first evaluation in a number format, and from the whole batch."""
    layer, inputs, z = build_batch(dtype=torch.float32)
    f, rows = layer.prepare(*inputs), torch.tensor([4, 0, 3])
    masks = [(5, 1, D), (HEADS, 5, QLEN, QLEN + 5), (5, 1, INNER), (5, 1, D)]
    expected = [(5, QLEN, 3 * D), *[(HEADS, 5, 5, D // HEADS)] * 2, *masks]
    with Gathers() as gathers:
        f(z)
        some = f.select(rows)
    assert gathers.shapes == []
    own = z[rows]
    for enabled in (False, True):
        for times in (1, 0):
            with Gathers() as gathers, bf16(enabled), torch.no_grad():
                some(own)
                some.plain(own)
            assert gathers.shapes == expected * times
    with Gathers() as gathers:
        some.select(torch.tensor([1]))(own[1:2])
    assert gathers.shapes == [(3,), *expected]


def test_selected_samples_of_a_compiled_layer():
    torch._dynamo.reset()
    layer, inputs, z = build_batch("pre-LN")
    f, rows = layer.prepare(*inputs), torch.tensor([4, 0, 3])
    expected, graphs = f(z)[rows], torch._dynamo.utils.counters["stats"]
    layer._compiled = torch.compile(evaluate, backend="eager", dynamic=False)  # generates no code
    with torch.no_grad():
        before = graphs["unique_graphs"]
        close(f.select(rows)(z[rows]), expected)
        assert graphs["unique_graphs"] == before + 1
        close(f.select(rows).select(rows[1:2])(z[4:]), expected[:1])
