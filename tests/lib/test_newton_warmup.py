"""Newton-Krylov's plain iterations at first, and inference mode."""

from functools import partial

import pytest
import torch

from lib.solvers import newton_krylov
from problems import Recorder, batched_tanh

by_jvp = pytest.mark.parametrize("jvp", ["reverse", "forward"])
by_stop = pytest.mark.parametrize("stop", ["batch", "sample"])


# ---- plain iterations first ------------------------------------------------------------------


def normalised(z):
    """A layer that begins with a layer normalisation, as a pre-norm transformer's does."""
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double() / 16
    return torch.nn.functional.layer_norm(z, (16,)) @ mixing + torch.arange(16).double() / 16


@by_stop
@by_jvp
def test_from_zero_through_a_layer_normalisation(jvp, stop):
    """Whose derivative there is 300, and tells nothing of what is further away."""
    solve = partial(newton_krylov, normalised, torch.zeros(3, 16).double(), threshold=30, eps=1e-9)
    assert solve(jvp=jvp, stop=stop)["lowest"] < 1e-4
    assert solve(jvp=jvp, stop=stop, warmup=0)["lowest"] > 0.05


@by_stop
@pytest.mark.parametrize("warmup", [0, 1, 3, 50])
def test_warmup_iterates_plainly(warmup, stop):
    f, _, _ = batched_tanh(gain=0.9)
    recorder, x0 = Recorder(f), torch.zeros(3, 12, dtype=torch.float64)
    solution = newton_krylov(recorder, x0, threshold=20, eps=0.0, warmup=warmup, stop=stop)
    x = x0
    for point in recorder.points[: min(warmup + 1, 20)]:
        assert torch.equal(point, x)
        x = f(x)
    assert solution["nfe"] + solution["products"] <= 20
    assert (solution["products"] > 0) == (warmup < 20)
    if warmup < 20:
        assert not torch.equal(recorder.points[warmup + 1], x)


@by_stop
@by_jvp
@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_a_warmup_that_raises_the_residual_is_undone(jvp, stop, warmup):
    """By each sample for itself: from 20, 1 + z - z^3 leads to -7979; from 0.1 it leads nearer."""

    def f(z):
        return 1 + z - z**3

    x0 = torch.tensor([[20.0], [0.1]], dtype=torch.float64)
    calls = Recorder(f)
    options = {"eps": 1e-9, "stop_mode": "abs", "jvp": jvp, "stop": stop, "warmup": warmup}
    solution = newton_krylov(calls, x0, threshold=100, **options)
    points = calls.points
    first = points[1]
    assert torch.equal(first, f(x0))
    visited = [p[0].item() for p in points if p[0].item() not in (20.0, first[0].item())]
    assert all(abs(z) <= 20 for z in visited)
    assert solution["converged"].all()
    assert solution["nfe"] <= 18


# ---- inference mode ---------------------------------------------------------------------------


@by_stop
@by_jvp
@pytest.mark.parametrize("held", [False, True])
def test_inference_mode_changes_nothing(jvp, stop, held):
    """Neither for a start made there, nor for a map that holds tensors made there."""
    f, _, _ = batched_tanh(gain=2.0)
    shift = torch.linspace(-1, 1, 12, dtype=torch.float64)
    options = {"threshold": 60, "eps": 1e-9, "jvp": jvp, "stop": stop}
    expected = newton_krylov(lambda z: f(z) * shift, torch.zeros(3, 12).double(), **options)
    with torch.inference_mode():
        x0 = torch.zeros(3, 12, dtype=torch.float64)
        factor = shift.clone() if held else shift
        found = newton_krylov(lambda z: f(z) * factor, x0, **options)
        assert torch.is_inference_mode_enabled()
    assert found["products"] == expected["products"] > 0
    assert found["abs_trace"] == pytest.approx(expected["abs_trace"], rel=1e-6, abs=1e-12)
    torch.testing.assert_close(found["result"].clone(), expected["result"], rtol=0, atol=1e-10)
