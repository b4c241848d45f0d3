"""best='sample': each sample gets its own best point; when the solve stops, nothing changes."""

import math
from functools import partial
from itertools import product

import pytest
import torch

from lib.deq import DEQ
from lib.errors import InputError
from lib.solvers import ADJOINT_SOLVERS, SOLVERS, broyden, fixed_point_iteration, get_solver
from parameters import slow_but
from problems import SHAPES, NanFrom, Recorder, affine, tanh_layer

EVERY = SOLVERS | ADJOINT_SOLVERS | {
    "broyden of few": partial(broyden, memory=3),
    "damped": partial(fixed_point_iteration, damping=0.7),
    "broyden with line search": partial(broyden, ls=True),
}  # fmt: skip
by_name = pytest.mark.parametrize("name", EVERY)
LINEAR = ("gmres", "bicgstab")


def mixed(name, shape=SHAPES[2]):
    """Sample 0 is easy, sample 1 is not, for any method; sample 2 is on its way."""
    base = tanh_layer(shape)
    if name in LINEAR:
        matrices = torch.zeros(3, 12, 12, dtype=torch.float64)
        matrices[1] = torch.diag(torch.ones(11, dtype=torch.float64), 1) * 3
        matrices[1, 11, 0] = 3
        matrices[2] = torch.diag(torch.linspace(-0.9, 0.9, 12, dtype=torch.float64))
        return affine(matrices, shape).f, base.x0

    def f(z):
        out = base.f(z)
        wild = 5 * torch.sin(7 * z[1] + 1) + z[1].roll(1, 0).flip(0)
        return torch.stack([out[0], wild, out[2]])

    return f, base.x0


@by_name
@pytest.mark.parametrize(
    ("stop_mode", "rank", "check_every"),
    slow_but(
        [("abs", 2, 1), ("rel", 3, 4), ("abs", 4, 4), ("rel", 2, 1)],
        product(("abs", "rel"), SHAPES, (1, 4)),
    ),
)
def test_each_sample_gets_its_own_best_point(name, stop_mode, rank, check_every):
    f, x0 = mixed(name, SHAPES[rank])
    recorder = Recorder(f)
    options = {"threshold": 25, "eps": 1e-9, "stop_mode": stop_mode, "check_every": check_every}
    solution = EVERY[name](recorder, x0, best="sample", **options)
    published = EVERY[name](f, x0, **options)
    for key in ("abs_trace", "rel_trace", "nfe", "products", "reason", "prot_break"):
        assert solution[key] == published[key], key

    # By the points that count as evaluated: not those at which products were taken.
    counted = torch.tensor(solution["abs_trace"])
    points = torch.stack(recorder.points).flatten(2)
    g = (torch.stack(recorder.values).flatten(2) - points).norm(dim=2)
    size = torch.stack(recorder.values).flatten(2).norm(dim=2)
    if len(g) > len(counted):
        rows = [int((g.square().sum(1).sqrt() - c).abs().argmin()) for c in counted.double()]
        points, g, size = points[rows], g[rows], size[rows]
    residual = g if stop_mode == "abs" else g / size
    for sample in range(3):
        at = residual[:, sample].argmin()
        assert torch.equal(solution["result"][sample].flatten(), points[at, sample])
        assert solution["residual"][sample].item() == pytest.approx(residual[at, sample].item())
    assert torch.equal(solution["converged"], solution["residual"] < 1e-9)
    best = residual.argmin(0)
    assert solution["nstep"] == best.max()
    own_g = g.gather(0, best[None]).norm().item()
    own_f = size.gather(0, best[None]).norm().item()
    assert solution["abs_lowest"] == pytest.approx(own_g)
    assert solution["rel_lowest"] == pytest.approx(own_g / own_f)
    assert (
        solution["lowest"]
        == solution[f"{stop_mode}_lowest"]
        <= min(solution[f"{stop_mode}_trace"]) * (1 + 1e-12 if stop_mode == "abs" else math.inf)
    )
    assert (solution["residual"] <= published["residual"] * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", ["fixed_point_iteration", "damped"])
def test_a_wandering_sample_does_not_cost_its_mates(name):
    """As published they get the point at which it happened to be nearest: digits are lost.

    Its residual is least at the third evaluation, when its mate has one digit.
    """
    sizes = [3.0, 2.0, 1.0, *[5.0] * 100]
    calls = iter(sizes)

    def f(z):
        return torch.stack([0.5 * z[0] + 1, z[1] + next(calls)])

    x0 = torch.zeros(2, 3, dtype=torch.float64)
    options = {"threshold": 90, "eps": 1e-9, "stop_mode": "abs"}
    published = EVERY[name](f, x0, **options)
    calls = iter(sizes)
    own = EVERY[name](f, x0, best="sample", **options)
    assert own["abs_trace"] == published["abs_trace"]
    assert published["residual"][0] > 1e6 * own["residual"][0]
    assert own["converged"].tolist() == [True, False]
    assert published["converged"].tolist() == [False, False]


@by_name
def test_lost_samples_keep_what_they_had(name):
    """NaN of one sample from the second evaluation on: the same with either choice."""
    f, x0 = mixed(name)
    solve = partial(EVERY[name], threshold=25, eps=1e-9)
    own = solve(NanFrom(f, sample=2, call=1), x0, best="sample")
    published = solve(NanFrom(f, sample=2, call=1), x0)
    assert own["finite"].tolist() == published["finite"].tolist() == [True, True, False]
    assert torch.equal(own["result"][2], published["result"][2])
    assert torch.isfinite(own["result"]).all()
    assert math.isfinite(own["lowest"])


@by_name
def test_of_one_sample_there_is_no_other_choice(name):
    f, x0 = mixed(name)
    row = torch.tensor([0])
    solve = partial(EVERY[name], lambda z: f(z.expand(3, 12))[row], x0[row], threshold=20)
    own, published = solve(best="sample"), solve(best="batch")
    assert torch.equal(own["result"], published["result"])
    for key in ("nstep", "lowest", "abs_lowest", "rel_lowest"):
        assert own[key] == published[key]


def test_stop_by_sample_returns_them_anyway():
    f, x0 = mixed("anderson")
    solve = partial(EVERY["anderson"], f, x0, threshold=20, stop="sample")
    assert torch.equal(solve()["result"], solve(best="sample")["result"])
    with pytest.raises(InputError, match="leave best out"):
        solve(best="batch")


@pytest.mark.parametrize("value", ["each", True, 3])
def test_misuse_is_named(value):
    with pytest.raises(InputError, match=r"^best is "):
        EVERY["anderson"](torch.cos, torch.zeros(1, 2), best=value)
    with pytest.raises(InputError, match="keep_inverse is True, but must be False with best="):
        broyden(torch.cos, torch.zeros(1, 2), keep_inverse=True, best="sample")


def test_by_name():
    """As an option of a solver's text; the default is as published."""
    f, x0 = mixed("anderson")
    found = get_solver("anderson:best=sample")(f, x0, threshold=30)
    expected = EVERY["anderson"](f, x0, threshold=30, best="sample")
    assert torch.equal(found["result"], expected["result"])
    published = [
        EVERY["anderson"](f, x0, threshold=30, **o)["result"] for o in ({}, {"best": "batch"})
    ]
    assert torch.equal(*published)
    z = DEQ("anderson:best=sample", "gmres")(f, x0, f_thres=30, training=False).z_star
    assert torch.equal(z, expected["result"])
