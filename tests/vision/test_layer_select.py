"""f.select(rows) of the multiscale layer: f for some of the images alone."""

from functools import partial

import pytest
import torch

from lib.layer_utils import list2vec
from mdeq_vision import layer
from measures import Gathers
from small_vision import build

BATCH = 4  # as many as branch 0 has channels: shapes do not tell weights from samples
MODELS = {
    "one branch": (1, {"NUM_BLOCKS": [2]}),
    "two branches": (2, {"NUM_BLOCKS": [2, 1]}),
    "three branches": (3, {"NUM_BLOCKS": [2, 1, 2], "WNORM": True}),
    "without affine parameters": (2, {"BLOCK_GN_AFFINE": False, "POST_GN_AFFINE": False}),
}
every_model = pytest.mark.parametrize("name", MODELS)
ROWS = {
    "one": [2],
    "some": [0, 2, 3],
    "in another order": [3, 1],
    "all": [0, 1, 2, 3],
    "all, in another order": [2, 0, 3, 1],
}
every_rows = pytest.mark.parametrize("rows", [torch.tensor(r) for r in ROWS.values()], ids=ROWS)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def bf16(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def inputs(name="three branches", dtype=torch.float64, dropout=0.3, **changes):
    """A layer, an injection and a state."""
    branches, settings = MODELS[name]
    model = build("cls", branches, DROPOUT=dropout, **settings, **changes)
    torch.manual_seed(0)
    sizes = layer.branch_sizes(6, 5, branches)
    z = [torch.randn(BATCH, c, *s).to(dtype) for c, s in zip(model.channels, sizes, strict=True)]
    injection = torch.randn(BATCH, model.channels[0], 6, 5).to(dtype).requires_grad_()
    return model.fullstage.to(dtype), injection, z


def take(z, rows):
    return [z_i[rows] for z_i in z]


@every_rows
@every_model
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_selected_samples(name, rows, dropout):
    f_layer, injection, z = inputs(name, dropout=dropout)
    f = f_layer.prepare(injection, z)
    expected = f(z)
    close(f.select(rows)(take(z, rows)), take(expected, rows))
    with torch.no_grad():
        close(f.select(rows)(take(z, rows)), take(expected, rows))
    assert all(torch.equal(a, b) for a, b in zip(f(z), expected, strict=True))


@every_model
def test_selections_of_selections(name):
    """Rows count within the selection, whether that was evaluated before or not."""
    f_layer, injection, z = inputs(name)
    some = f_layer.prepare(injection, z)
    own, expected = torch.arange(BATCH), some(z)
    for rows in ([3, 1, 0, 2], [3, 0, 1], [2, 0], [1]):
        some, own = some.select(torch.tensor(rows)), own[rows]
        if len(own) != 3:
            close(some(take(z, own)), take(expected, own))
    assert own.tolist() == [2]


@every_rows
@every_model
def test_gradients_of_selected_samples(name, rows):
    """First and second ones, of z and of all that is trained; the first use is a solver's."""
    f_layer, injection, z = inputs(name)
    f = f_layer.prepare(injection, z)
    some = f.select(rows)
    with torch.no_grad():
        some(take(z, rows))
    leaves, gradients = [*z, injection, *f_layer.parameters()], []
    for z_i in z:
        z_i.requires_grad_()
    for selected in (some(take(z, rows)), take(f(z), rows)):
        loss = list2vec(selected).sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum(g.square().sum() for g in first[: len(z)])
        second = torch.autograd.grad(loss, leaves, retain_graph=True)  # both have a part in common
        gradients.append(first + second)
    for a, b in zip(*gradients, strict=True):
        close(a, b, rtol=1e-9)
        assert b.abs().max() > 0


@every_model
def test_bf16_of_selected_samples(name):
    f_layer, injection, z = inputs(name, torch.float32)
    rows = torch.tensor([3, 0, 1])
    own = take(z, rows)
    with bf16(), torch.no_grad():
        f = f_layer.prepare(injection, z)
        some = f.select(rows)
        with bf16(False):
            exact = some(own)
            close(exact, take(f(z), rows), atol=1e-5)
        found = some(own)
        close(found, take(f(z), rows), atol=0.05)  # eight bits of values up to 3
    assert {t.dtype for t in found} == {torch.float32}
    assert (list2vec(found) - list2vec(exact)).abs().max() > 1e-3


def test_samples_are_gathered_once_and_weights_never():
    """At the first evaluation in a number format, and from the whole batch."""
    f_layer, injection, z = inputs("two branches", torch.float32)
    rows, first = torch.tensor([3, 0, 1]), (BATCH, 4, 1, 1)
    own, expected = take(z, rows), [first, tuple(injection.shape), first, (BATCH, 6, 1, 1)]
    with bf16():
        f = f_layer.prepare(injection, z)
    with Gathers() as gathers:
        f(z)
        some = f.select(rows)
    assert gathers.shapes == []
    for enabled in (False, True):
        for times in (1, 0):
            with Gathers() as gathers, bf16(enabled), torch.no_grad():
                some(own)
            assert gathers.shapes == expected * times
    with Gathers() as gathers:
        some.select(torch.tensor([1]))(take(own, [1]))
    assert gathers.shapes[-4:] == expected


def test_selected_samples_of_a_compiled_layer(monkeypatch):
    torch._dynamo.reset()
    form = torch.compile(layer.MultiscaleLayer.forward, backend="eager", dynamic=False)  # no code
    monkeypatch.setattr(layer, "_compiled", lambda kind: form)
    f_layer, injection, z = inputs(COMPILE=True)
    f, rows = f_layer.prepare(injection, z), torch.tensor([3, 0, 1])
    expected, graphs = take(f(z), rows), torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        before = graphs["unique_graphs"]
        close(f.select(rows)(take(z, rows)), expected)
        assert graphs["unique_graphs"] == before + 1
