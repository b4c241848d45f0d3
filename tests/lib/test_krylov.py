"""gmres and bicgstab against dense solves, and what they report, count and survive."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.solvers import bicgstab, gmres
from lib.solvers.maps import Affine
from lib.solvers.norms import orthogonalise
from problems import SHAPES

SOLVERS = {"gmres": gmres, "gmres anew": partial(gmres, restart=5), "bicgstab": bicgstab}
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
by_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])
by_stop = pytest.mark.parametrize("stop", ["batch", "sample"])
EYE = torch.eye(12, dtype=torch.float64)


def noise(*shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spectrum(values) -> torch.Tensor:
    """(3, n, n), symmetric, of these eigenvalues."""
    basis = torch.linalg.qr(noise(3, len(values), len(values)))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT


def of_radius(radius, batch=3, size=12, seed=0) -> torch.Tensor:
    """(batch, size, size), not symmetric, of complex eigenvalues; spectral radius as said."""
    matrices = noise(batch, size, size, seed=seed)
    return radius * matrices / torch.linalg.eigvals(matrices).abs().amax(1)[:, None, None]


def rotations(radius) -> torch.Tensor:
    """Eigenvalues radius e^(+-i a): of six different angles a, others for each sample."""
    matrices = torch.zeros(3, 12, 12, dtype=torch.float64)
    for sample in range(3):
        for k in range(6):
            angle = 0.4 + 0.45 * k + 0.1 * sample
            c, s = radius * math.cos(angle), radius * math.sin(angle)
            block = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
            matrices[sample, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = block
    return matrices


B = noise(3, 12, seed=9)  # right-hand sides, and starts
START = noise(3, 12, seed=3)
MATRICES = {
    "symmetric": spectrum(torch.linspace(-0.5, 0.95, 12).tolist()),
    "random": of_radius(0.9),
    "radius 1.3": of_radius(1.3, seed=5),
    "rotation of 1.3": rotations(1.3),
    "all but the identity": 0.999 * EYE + 1e-4 * noise(3, 12, 12),
    "zero": torch.zeros(3, 12, 12, dtype=torch.float64),
    "nilpotent": torch.diag(torch.ones(11, dtype=torch.float64), 1).repeat(3, 1, 1),
    "of rank one": noise(3, 12, 1) @ noise(3, 1, 12, seed=1) / 12,
    "of other difficulty": torch.stack(
        [0.01 * of_radius(1.0)[0], of_radius(0.99)[1], spectrum([-3.0] * 6 + [0.5] * 6)[2]]
    ),
}
# Here five vectors at a time do not do.
NOT_ANEW = ("rotation of 1.3", "radius 1.3", "nilpotent")


class Counted:
    """Products with J, and what they were asked for; NaN for a sample from call ``nan_at`` on."""

    def __init__(self, matrices, nan_at=None, sample=1):
        self.matrices, self.nan_at, self.sample = matrices, nan_at, sample
        self.vectors = []

    def __call__(self, v):
        self.vectors.append(v.clone())
        flat = v.double().reshape(len(v), -1)
        out = torch.einsum("bij,bj->bi", self.matrices, flat).to(v.dtype).view(v.shape)
        if self.nan_at is not None and len(self.vectors) > self.nan_at:
            out[self.sample] = math.nan
        return out

    @property
    def calls(self):
        return len(self.vectors)


def solve(solver, matrices, b=B, x0=None, *, known=True, nan_at=None, **options):
    """From x0, or a free zero; all that holds for any solve is checked. With the products.

    ``known``: the map is said to be affine; else it is just a function.
    """
    product = Counted(matrices, nan_at)
    start = torch.zeros_like(b) if x0 is None else x0
    f = Affine(product, b, start if x0 is None else None) if known else lambda z: product(z) + b
    solution = solver(f, start, **{"threshold": 400, "eps": 1e-9} | options)
    check(solution, matrices, b, start)
    # The state goes to f rounded to half precision: there zero is another tensor, and not free.
    free = known and x0 is None and b.dtype != torch.bfloat16
    assert product.calls == solution["products"] + solution["nfe"] - free
    assert all(torch.isfinite(v).all() for v in product.vectors)
    return solution, product


def residuals(matrices, b, x) -> tuple[torch.Tensor, torch.Tensor]:
    """||f(x) - x|| and ||f(x)|| per sample, in float64."""
    x = x.double().flatten(1)
    fx = torch.einsum("bij,bj->bi", matrices, x) + b.double().flatten(1)
    return (fx - x).norm(dim=1), fx.norm(dim=1) + 1e-30


def check(solution, matrices, b, x0) -> None:
    """Dtypes, counts and true residuals, found again from the result."""
    x = solution["result"]
    assert (x.shape, x.dtype) == (x0.shape, x0.dtype)
    assert torch.isfinite(x).all()
    own, size = residuals(matrices, b, x)
    # The solver has f in the dtype of x0.
    norms = (1 + torch.linalg.matrix_norm(matrices, 2)) * x.double().flatten(1).norm(dim=1)
    norms = norms + b.double().flatten(1).norm(dim=1)
    rounding = 8 * torch.finfo(x0.dtype).eps * norms
    fine, residual, eps = solution["finite"], solution["residual"], solution["eps"]
    if solution["stop_mode"] == "abs":
        assert ((residual - own).abs() <= rounding)[fine].all()
    else:
        assert ((residual - own / size).abs() <= rounding / size * (1 + own / size))[fine].all()
    assert torch.equal(solution["converged"], (residual < eps) | (residual == 0))
    assert solution["nfe"] == len(solution["abs_trace"]) == len(solution["rel_trace"])
    assert solution["nfe"] + solution["products"] <= solution["threshold"]
    assert type(solution["prot_break"]) is bool
    if fine.all():
        assert solution["abs_lowest"] == pytest.approx(own.norm().item(), abs=rounding.sum().item())


# --- Against dense solves -----------------------------------------------------------------------


@by_solver
@by_mode
@by_stop
@pytest.mark.parametrize("kind", MATRICES)
def test_dense_solution(solver, stop_mode, stop, kind):
    matrices = MATRICES[kind]
    if solver is SOLVERS["gmres anew"] and kind in NOT_ANEW:
        pytest.skip("needs the whole Krylov space")
    x0 = None if (stop_mode == "abs") == (stop == "batch") else START  # any two meet
    options = {"eps": 1e-10, "stop_mode": stop_mode, "stop": stop}
    solution, _ = solve(solver, matrices, x0=x0, **options)
    assert solution["reason"] == "eps"
    expected = torch.linalg.solve(EYE - matrices, B)
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(EYE - matrices), 2)
    # ||x - x*|| <= ||(I - J)^-1|| ||g||, and ||g|| is below eps per sample, or eps ||x||.
    bound = 1e-10 * (expected.norm() if stop_mode == "rel" else 3**0.5) * inverse.max()
    assert (solution["result"] - expected).norm() <= 1.01 * bound
    if solver is gmres and kind != "all but the identity":  # at most one per eigenvalue
        assert solution["products"] <= {"zero": 1, "of rank one": 2}.get(kind, 12)


@by_stop
@pytest.mark.parametrize("kind", ["symmetric", "random", "radius 1.3", "of other difficulty"])
def test_gmres_is_the_least_residual_of_the_krylov_space(kind, stop):
    matrices, operator = MATRICES[kind], EYE - MATRICES[kind]
    r = residual = B - torch.einsum("bij,bj->bi", operator, START)
    space = []
    for k in range(1, 9):
        space.append(r / r.norm(dim=1, keepdim=True))
        r = torch.einsum("bij,bj->bi", matrices, space[-1])
        basis = torch.linalg.qr(torch.stack(space, dim=2))[0]  # (3, 12, k)
        c = torch.linalg.lstsq(operator @ basis, residual[:, :, None]).solution
        options = {"threshold": k + 2, "eps": 0.0, "stop_mode": "abs", "stop": stop}
        solution, _ = solve(gmres, matrices, x0=START, **options)
        assert (solution["nfe"], solution["products"]) == (2, k)
        expected = START + (basis @ c)[:, :, 0]
        torch.testing.assert_close(solution["result"], expected, rtol=0, atol=1e-9)


@by_solver
@by_stop
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_an_f_that_is_not_known_to_be_affine(solver, stop, scale):
    """Products are differences of values: as good, and no evaluation for f(0) or f(x0) again."""
    for x0 in (torch.zeros_like(B), scale * START):
        options = {"threshold": 600, "stop": stop}
        known, _ = solve(solver, MATRICES["random"], scale * B, x0, **options)
        found, _ = solve(solver, MATRICES["random"], scale * B, x0, known=False, **options)
        assert found["reason"] == known["reason"] == "eps"
        assert abs(found["products"] - known["products"]) <= 2
        difference = (found["result"] - known["result"]) / scale
        assert difference.abs().max() < 1e-6


@by_solver
@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 2), (torch.bfloat16, 3), (torch.float32, 4)], ids=str
)
@by_mode
@by_stop
def test_dtypes_and_ranks(solver, dtype, rank, stop_mode, stop):
    # Well above the rounding of f, times the norm of the states (up to 8) in mode 'abs'.
    eps = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * (4 if stop_mode == "abs" else 1)
    options = {"threshold": 60, "eps": eps, "stop_mode": stop_mode, "stop": stop}
    b = B.to(dtype).view(SHAPES[rank])
    solution, product = solve(solver, 0.8 * MATRICES["symmetric"], b, **options)
    assert solution["reason"] == "eps"
    assert {(v.dtype, v.shape) for v in product.vectors} == {(dtype, b.shape)}


@by_solver
def test_float32_reaches_its_rounding(solver):
    """Recursions lose digits that new cycles, from the true residual, find again."""
    solution, _ = solve(solver, MATRICES["symmetric"], B.float(), threshold=200, eps=3e-7)
    assert solution["reason"] == "eps"


def test_orthogonalised_twice():
    """What is left of a vector nearly in the space is orthogonal to it all the same."""
    basis = torch.linalg.qr(noise(3, 12, 5))[0].permute(2, 0, 1).contiguous()  # (5, 3, 12)
    image = (noise(5, 3, 1) * basis).sum(0) + 1e-9 * noise(3, 12, seed=1)
    rest, _ = orthogonalise(image, basis.transpose(0, 1))
    norm = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    assert norm.max() < 1e-8
    assert torch.einsum("kbd,bd->bk", basis, rest / norm).abs().max() < 1e-14


@by_solver
def test_a_finished_sample_is_not_multiplied(solver):
    """Within a cycle, too: its vectors are zero from then on."""
    found, product = solve(solver, MATRICES["of other difficulty"], threshold=600, stop="sample")
    busy = [sum(bool(v[i].any()) for v in product.vectors) - found["nfe"] for i in range(3)]
    assert busy[0] <= 8 < 10 <= max(busy)


@by_solver
@by_stop
def test_start_at_the_solution(solver, stop):
    expected = torch.linalg.solve(EYE - MATRICES["random"], B)
    solution, _ = solve(solver, MATRICES["random"], x0=expected, eps=1e-10, stop=stop)
    assert torch.equal(solution["result"], expected)
    assert (solution["nfe"], solution["products"], solution["reason"]) == (1, 0, "eps")


@by_solver
@by_stop
@by_mode
@pytest.mark.parametrize("zeros", [[0, 1, 2], [1]], ids=["all", "one"])
def test_no_right_hand_side(solver, stop, stop_mode, zeros):
    """b = 0: zero is the solution. For all of them no product is made; for one it stays there."""
    b = B.clone()
    b[zeros] = 0.0
    options = {"threshold": 600, "stop": stop, "stop_mode": stop_mode}
    solution, product = solve(solver, MATRICES["random"], b, **options)
    assert not solution["result"][zeros].any()
    assert solution["reason"] == "eps"
    assert solution["residual"][zeros].eq(0).all()
    assert not any(v[zeros].any() for v in product.vectors)
    if len(zeros) == 3:
        assert (solution["nfe"], solution["products"]) == (1, 0)
    elsewhere, _ = solve(solver, MATRICES["random"], b, START, threshold=600, stop_mode="abs")
    assert elsewhere["reason"] == "eps"
    assert elsewhere["result"][zeros].abs().max() < 1e-7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    size=st.integers(1, 15),
    radius=st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.3, 3.0]),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    from_zero=st.booleans(),
    stop=st.sampled_from(["batch", "sample"]),
    stop_mode=st.sampled_from(["abs", "rel"]),
    threshold=st.integers(1, 60),
)
def test_random_systems(seed, batch, size, radius, scale, from_zero, stop, stop_mode, threshold):
    """Whatever the system: counts, a true residual, and never worse than the start."""
    matrices = noise(batch, size, size, seed=seed)
    leading = torch.linalg.eigvals(matrices).abs().amax(1).clamp_min(1e-3)
    matrices = radius * matrices / leading[:, None, None]
    b = scale * noise(batch, size, seed=seed + 1)
    x0 = None if from_zero else scale * noise(batch, size, seed=seed + 2)
    first, value = residuals(matrices, b, torch.zeros_like(b) if from_zero else x0)
    for solver in SOLVERS.values():
        options = {"threshold": threshold, "stop": stop, "stop_mode": stop_mode}
        solution, _ = solve(solver, matrices, b, x0, **options)
        if stop == "batch":
            assert solution["lowest"] <= solution[f"{stop_mode}_trace"][0]
        else:
            before = first if stop_mode == "abs" else first / value
            assert (solution["residual"] <= before * (1 + 1e-9)).all()


# --- Singular systems and breakdowns ------------------------------------------------------------

SINGULAR = spectrum([*torch.linspace(-0.5, 0.8, 11).tolist(), 1.0])


@by_solver
@by_stop
@by_mode
def test_singular_but_consistent(solver, stop, stop_mode):
    """Eigenvalue 1, and b in the range of I - J: one of the solutions, of moderate size."""
    b = torch.einsum("bij,bj->bi", EYE - SINGULAR, noise(3, 12))
    options = {"threshold": 120, "stop": stop, "stop_mode": stop_mode}
    solution, _ = solve(solver, SINGULAR, b, **options)
    assert solution["reason"] == "eps"
    assert solution["result"].norm() < 1e3


@by_solver
@by_stop
@by_mode
def test_singular_and_inconsistent(solver, stop, stop_mode):
    """No solution: the residual stays at that of the least squares, and is reported as it is.

    Nor does the point run away along the eigenvector, where the relative residual is small.
    """
    options = {"threshold": 150, "eps": 1e-7, "stop": stop, "stop_mode": stop_mode}
    solution, _ = solve(solver, SINGULAR, **options)
    assert not solution["converged"].any()
    assert not solution["prot_break"]
    least = torch.linalg.pinv(EYE - SINGULAR, rtol=1e-9) @ B[:, :, None]
    expected, _ = residuals(SINGULAR, B, least[:, :, 0])
    found, _ = residuals(SINGULAR, B, solution["result"])
    assert (found < (1.3 if solver is bicgstab else 1.01) * expected).all()
    assert solution["result"].norm() < 1e5
    assert solution["reason"] == ("threshold" if solver is bicgstab else "stalled")


@by_solver
@by_stop
def test_the_identity_has_no_solution(solver, stop):
    """J = I: the first products show that nothing can be done."""
    solution, product = solve(solver, EYE.repeat(3, 1, 1), threshold=100, stop=stop)
    assert not solution["result"].any()
    assert solution["reason"] == "stalled"
    assert solution["residual"].eq(1).all()
    assert product.calls <= 2


@by_solver
@by_stop
def test_one_singular_sample(solver, stop):
    """It does not keep the others from their solution; but in the norm of the batch, where its
    residual is all there is, what they gain below 1e-8 of that cannot be seen."""
    matrices = of_radius(0.5)
    matrices[1] = EYE
    solution, _ = solve(solver, matrices, threshold=100, stop=stop)
    assert (solution["residual"][[0, 2]] < (1e-9 if stop == "sample" else 1e-4)).all()
    assert not solution["result"][1].any()
    assert solution["residual"][1] == 1.0
    if stop == "sample":
        assert solution["reason"] == "stalled"


@by_stop
@pytest.mark.parametrize("size", [2, 4, 12])
def test_bicgstab_where_the_original_breaks_down(stop, size):
    """I - J skew-symmetric: r'(I - J) r = 0 at every point, so that its steps have no length."""
    skew = noise(3, size, size)
    matrices = torch.eye(size, dtype=torch.float64) - (skew - skew.mT)
    solution, _ = solve(bicgstab, matrices, B[:, :size], threshold=300, stop=stop)
    assert solution["reason"] == "eps"


@by_stop
def test_bicgstab_begins_anew(stop):
    """r_0'r_1 = 0 for some of these right-hand sides of two dimensions."""
    matrices = torch.tensor([[[0.5, -1.0], [-1.0, 0.5]]], dtype=torch.float64)
    for angle in torch.linspace(0, math.pi, 49).tolist():
        b = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        solution, _ = solve(bicgstab, matrices, b, threshold=60, stop=stop)
        assert solution["converged"].all()


def test_bicgstab_where_stabilising_steps_are_short():
    """Radius 1.3 in 60 dimensions: steps of least residual lose the recursion of most samples."""
    matrices = of_radius(1.3, batch=16, size=60, seed=4)
    options = {"threshold": 200, "eps": 1e-6, "stop": "sample"}
    solution, _ = solve(bicgstab, matrices, noise(16, 60, seed=5), **options)
    assert solution["converged"].sum() >= 15


# --- Restarts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [1, 2, 5, 50])
@by_stop
def test_restart(restart, stop):
    """Cycles of so many products, an evaluation after each, and the residual falls from each."""
    solver = partial(gmres, restart=restart)
    solution, _ = solve(solver, 0.8 * MATRICES["symmetric"], stop=stop)
    assert solution["reason"] == "eps"
    assert solution["products"] <= restart * (solution["nfe"] - 1)
    assert (solution["nfe"] == 2) == (restart == 50)
    assert all(after < before for before, after in pairwise(solution["abs_trace"]))


def test_restart_of_one_is_steepest_descent_of_the_residual():
    x, operator = torch.zeros_like(B), EYE - MATRICES["random"]
    for _ in range(7):
        r = B - torch.einsum("bij,bj->bi", operator, x)
        image = torch.einsum("bij,bj->bi", operator, r)
        x = x + ((image * r).sum(1) / image.square().sum(1))[:, None] * r
    options = {"threshold": 15, "eps": 0.0}
    found, _ = solve(partial(gmres, restart=1), MATRICES["random"], **options)
    assert (found["nfe"], found["products"]) == (8, 7)
    torch.testing.assert_close(found["result"], x, rtol=0, atol=1e-12)


# --- Budgets ------------------------------------------------------------------------------------


@by_solver
@by_stop
@pytest.mark.parametrize(("known", "x0"), [(True, None), (False, START)], ids=["affine", "any f"])
def test_threshold_counts_evaluations_and_products(solver, stop, known, x0):
    lowest = []
    for threshold in range(1, 13):
        options = {"x0": x0, "known": known, "stop": stop, "eps": 0.0}
        solution, _ = solve(solver, MATRICES["random"], threshold=threshold, **options)
        assert solution["reason"] == "threshold"
        spent = solution["nfe"] + solution["products"]
        steps = 2 if solver is bicgstab else 1
        assert threshold - spent < steps + 1  # nothing is left that could be used
        lowest.append(solution["lowest"])
        by_count, _ = solve(solver, MATRICES["random"], max_nfe=threshold, **options)
        assert torch.equal(by_count["result"], solution["result"])
        assert by_count["reason"] == "max_nfe"
        assert by_count["nfe"] + by_count["products"] == spent
    assert lowest == sorted(lowest, reverse=True) or solver is bicgstab
    assert lowest[-1] < 0.5 * lowest[0]


@by_solver
def test_check_every_changes_nothing(solver):
    """Each cycle needs its residual."""
    rarely, _ = solve(solver, MATRICES["symmetric"], check_every=3)
    usual, _ = solve(solver, MATRICES["symmetric"])
    assert rarely["products"] == usual["products"]
    assert torch.equal(rarely["result"], usual["result"])


@by_solver
@by_stop
def test_floor(solver, stop):
    options = {"eps": 1e-12, "stop": stop, "threshold": 600}
    solution, _ = solve(solver, MATRICES["random"], floor=1e-3, **options)
    assert solution["reason"] == "floor"
    assert solution["rel_lowest"] < 1e-3
    assert solution["products"] < solve(solver, MATRICES["random"], **options)[0]["products"]


# --- Products that are not finite ---------------------------------------------------------------


@by_solver
@by_stop
@pytest.mark.parametrize("nan_at", range(6))
def test_nan_from_a_product(solver, stop, nan_at):
    """The sample rests at its best evaluated point, nobody is given NaN; the others are solved."""
    matrices, keep = of_radius(0.7), torch.tensor([0, 2])
    options = {"threshold": 80, "stop": stop}
    solution, product = solve(solver, matrices, nan_at=nan_at, **options)
    assert solution["finite"].tolist() == [True, False, True]
    assert not solution["converged"][1]
    assert not solution["prot_break"]
    if solver is not SOLVERS["gmres anew"] or nan_at < 5:  # before its first cycle ends
        assert not solution["result"][1].any()
        assert not any(v[1].any() for v in product.vectors[nan_at + 1 + (solver is bicgstab) :])
    alone, _ = solve(solver, matrices[keep], B[keep], **options)
    if stop == "sample":
        assert torch.equal(solution["sample_nfe"][keep], alone["sample_nfe"])
        torch.testing.assert_close(solution["result"][keep], alone["result"], rtol=0, atol=1e-10)
    else:  # the lost sample costs the batch nothing
        assert abs(solution["products"] - alone["products"]) <= 2
        torch.testing.assert_close(solution["result"][keep], alone["result"], rtol=0, atol=1e-7)


@by_solver
@by_stop
@pytest.mark.parametrize("known", [True, False], ids=["affine", "any f"])
def test_no_product_is_finite(solver, stop, known):
    x0, calls = torch.zeros_like(B), []

    def f(z):
        calls.append(z)
        return B * (1.0 if len(calls) == 1 else math.nan)

    f = Affine(lambda v: v * math.nan, B, x0) if known else f
    solution = solver(f, x0, threshold=30, stop=stop)
    assert torch.equal(solution["result"], x0)
    assert not solution["finite"].any()
    assert solution["reason"] == "diverged"
    assert solution["prot_break"]
    assert solution["nfe"] + solution["products"] <= 3
