"""States of any size, in any tensor: norms at the ends of the format, memory that is not ours."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.solvers import ADJOINT_SOLVERS, SOLVERS, broyden, fixed_point_iteration, norms
from lib.solvers.maps import Affine
from problems import NanFrom, contraction, tanh_layer

EVERY = SOLVERS | ADJOINT_SOLVERS | {
    "broyden of few": partial(broyden, memory=4),
    "broyden with line search": partial(broyden, ls=True),
}  # fmt: skip
by_name = pytest.mark.parametrize("name", EVERY)
by_stop = pytest.mark.parametrize("stop", ["batch", "sample"])
by_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])
LINEAR = ("gmres", "bicgstab")


# --- Norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_norms_at_every_scale(dtype, size):
    """To rounding, as far as the format reaches; zero and infinity are what they are."""
    limits = torch.finfo(dtype)
    shape = torch.randn(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape /= shape.abs().max()
    exponents = np.arange(math.log10(limits.tiny) + 2, math.log10(limits.max), 3.0)
    vectors = torch.cat([shape * 10.0**e for e in exponents]).to(dtype)
    exact = torch.cat([shape * (v / shape[0]).median() for v in vectors.double()])
    found = norms.norms(vectors)
    expected = [math.hypot(*v) for v in vectors.tolist()]
    assert found == pytest.approx(expected, rel=10 * limits.eps)
    assert exact.isfinite().all()
    ends = torch.tensor([[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]], dtype=dtype)
    zero, infinite, nan = norms.norms(ends)
    assert zero == 0.0
    assert not np.isfinite([infinite, nan]).any()


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e170, 1e300])
def test_total_and_relative_at_every_scale(scale):
    parts = scale * np.array([3.0, 0.0, 4.0])
    assert norms.total(parts) == pytest.approx(5 * scale, rel=1e-14)
    assert norms.total(np.zeros(3)) == 0.0
    assert norms.total(np.array([math.inf, 1.0])) == math.inf
    # Half of 1e-300 is what the denominator is kept from zero by.
    assert norms.relative(scale, 2 * scale) == pytest.approx(0.5, rel=0.4)
    assert norms.relative(0.0, 0.0) == 0.0
    assert norms.relative(1.0, 0.0) > 1e200


# --- Solves -------------------------------------------------------------------------------------


@by_name
@by_stop
@by_mode
def test_a_state_of_extreme_size_is_solved(name, stop, stop_mode):
    """f(z) = A z + b with b of that size, in float32: as the same with b of size 1."""
    if stop == "sample" and name == "broyden with line search":
        pytest.skip("a search is over the whole batch")
    base, x0 = contraction((2, 12)), torch.zeros(2, 12)
    options = {"threshold": 200, "stop": stop, "stop_mode": stop_mode}
    normal = EVERY[name](base.f, x0, eps=1e-5, **options)
    usual = normal["nfe"] + normal["products"]
    for scale in (1e-35, 1e-25, 1e-20, 1e-18, 1e17, 1e19, 1e22, 1e30):
        factor = 2.0 ** round(math.log2(scale))  # scaling rounds nothing
        eps = 1e-5 if stop_mode == "rel" else 1e-5 * factor

        def f(z, factor=factor):
            return (factor * base.f(z.double() / factor)).to(z.dtype)

        solution = EVERY[name](f, x0, eps=eps, **options)
        assert solution["converged"].any(), scale
        assert solution["lowest"] < eps * 2, scale
        error = (solution["result"].double() - factor * base.solution).norm()
        assert error < 1e-4 * factor * base.solution.norm(), scale
        spent = solution["nfe"] + solution["products"]
        assert abs(spent - usual) <= max(2, 0.2 * usual), scale


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_small_residual_is_not_a_solution(name, dtype):
    """f(z) = 0.5 z + 1e-25, and what is as small for float64: at z = 0 nothing is solved."""
    shift = 1e-180 if dtype == torch.float64 else 1e-25
    solution = EVERY[name](lambda z: 0.5 * z + shift, torch.zeros(2, 3, dtype=dtype), eps=3e-2)
    assert solution["result"].double().mean() == pytest.approx(2 * shift, rel=0.1)
    assert solution["converged"].all()
    # Absolutely, an eps is what the caller says; but eps = 0 is not reached by underflow.
    options = {"eps": 0.0, "stop_mode": "abs", "threshold": 3, "max_nfe": 3}
    solution = EVERY[name](lambda z: 0.9 * z + shift, torch.zeros(2, 3, dtype=dtype), **options)
    zero = solution["residual"] == 0
    assert torch.equal(zero, solution["converged"])
    assert not zero.any() or solution["result"].double().mean() > 9 * shift


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1.0, 1e21])
def test_an_adjoint_of_extreme_size(name, scale):
    """From zero, with products that are known: y = J y + g is linear in g."""
    base = contraction((3, 12), radius=0.9)
    matrices = base.jacobian.float()
    shift = torch.randn(3, 12, generator=torch.Generator().manual_seed(7))

    def solve(g):
        zero = torch.zeros(3, 12)
        affine = Affine(lambda v: torch.einsum("bij,bj->bi", matrices, v), g, zero)
        return EVERY[name](affine, zero, threshold=80, eps=1e-5)

    factor = 2.0 ** round(math.log2(scale))
    normal, scaled = solve(shift), solve(shift * factor)
    assert scaled["converged"].all()
    assert scaled["nfe"] + scaled["products"] == normal["nfe"] + normal["products"]
    torch.testing.assert_close(scaled["result"] / factor, normal["result"], rtol=1e-5, atol=1e-6)


@by_stop
@by_name
def test_a_finite_state_is_not_lost(name, stop):
    """Squares of 1e20 are infinite in float32, the state is not; one that is stays lost."""
    if stop == "sample" and name == "broyden with line search":
        pytest.skip("a search is over the whole batch")

    def f(z):
        return 0.5 * z + torch.tensor([[1e20], [1.0], [math.inf]])

    solution = EVERY[name](f, torch.zeros(3, 4), eps=1e-5, stop=stop)
    assert solution["finite"].tolist() == [True, True, False]
    assert solution["all_finite"] is False
    assert solution["result"][0].tolist() == pytest.approx([2e20] * 4, rel=1e-4)


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iteration"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e17])
def test_between_checks_nothing_small_counts_as_solved(name, scale):
    solve = partial(EVERY[name], lambda z: 0.5 * z + scale, torch.zeros(2, 3), threshold=60)
    solution = solve(eps=1e-4, check_every=7)
    assert solution["converged"].all()
    assert solution["result"].flatten().tolist() == pytest.approx([2 * scale] * 6, rel=1e-3)


# --- Memory that is not the solver's ------------------------------------------------------------


@by_name
@by_stop
@pytest.mark.parametrize("kind", ["a new tensor", "its argument", "a view", "one row for all"])
def test_the_result_is_a_tensor_of_its_own(name, stop, kind):
    """x0 is a fixed point already: what is done to the result is not done to x0."""
    if stop == "sample" and name == "broyden with line search":
        pytest.skip("a search is over the whole batch")
    f = {
        "a new tensor": lambda z: z + 0,
        "its argument": lambda z: z,
        "a view": lambda z: z.view(-1).view(z.shape),
        "one row for all": lambda z: z[:1].expand_as(z),
    }[kind]
    x0 = torch.ones(2, 3, dtype=torch.float64)
    solution = EVERY[name](f, x0, stop=stop)
    assert solution["nfe"] == 1
    assert torch.equal(solution["result"], x0)
    solution["result"].zero_()
    assert torch.equal(x0, torch.ones_like(x0))


@by_name
def test_the_result_is_not_a_tensor_of_f_either(name):
    """A map that hands out the same tensor at every call, as a constant does."""
    constant = torch.full((2, 3), 2.0, dtype=torch.float64)
    solution = EVERY[name](lambda z: constant, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(solution["result"], constant)
    solution["result"].zero_()
    assert torch.equal(constant, torch.full_like(constant, 2.0))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("x0", [torch.ones(2, 3), torch.ones(2, 3).bfloat16()], ids=str)
def test_a_map_that_writes_to_its_argument_is_refused(name, x0):
    """Its residual is zero wherever it is: without a word, anything would be a solution."""
    # Where f is differentiated, autograd refuses it first.
    refused = "in-place operation" if name == "newton_krylov" else "f writes to a state"
    with pytest.raises((InputError, RuntimeError), match=refused):
        SOLVERS[name](lambda z: z.mul_(0.5), x0.clone())


def test_a_map_with_a_buffer_of_its_own_is_refused():
    """It overwrites points that the iteration holds."""
    buffer = torch.zeros(2, 3)

    def f(z):
        return torch.add(0.5 * z, 1.0, out=buffer)

    with pytest.raises(InputError, match="no buffer of its own"):
        fixed_point_iteration(f, torch.zeros(2, 3), eps=1e-9)


# --- A start that is not finite -----------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@by_stop
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_start_that_is_not_finite_costs_one_evaluation(name, stop, value):
    if stop == "sample" and name == "broyden with line search":
        pytest.skip("a search is over the whole batch")
    calls = []

    def f(z):
        calls.append(z)
        return torch.tanh(z)

    x0 = torch.zeros(2, 3)
    x0[1, 2] = value
    with pytest.raises(InputError, match="x0 is 'not finite', but must be finite everywhere"):
        EVERY[name](f, x0, stop=stop)
    assert len(calls) == 1


def test_a_lost_sample_at_the_start_is_no_misuse():
    problem = tanh_layer()
    solution = fixed_point_iteration(NanFrom(problem.f, sample=0, call=0), problem.x0)
    assert solution["finite"].tolist() == [False, True, True]
