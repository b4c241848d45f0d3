"""Arnoldi's process against the Krylov space computed densely."""

import pytest
import torch

from lib.jacobian import arnoldi, leading_ritz_values, normalise, ritz_values


def setting(size=9):
    torch.manual_seed(0)
    matrices = torch.randn(2, size, size, dtype=torch.float64)
    v = normalise(torch.randn(2, size, dtype=torch.float64))[0]
    return matrices, v


def times(matrices):
    return lambda v: torch.einsum("bij,bj->bi", matrices, v)


def krylov_basis(matrices, v, m):
    """Orthonormal columns (B, D, m) of v, A v, A^2 v, ..., the first being v."""
    columns = [v]
    for _ in range(m - 1):
        columns.append(normalise(times(matrices)(columns[-1]))[0])
    basis, triangle = torch.linalg.qr(torch.stack(columns, dim=2))
    return basis * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]


def test_hessenberg_matrices_are_projections():
    matrices, v = setting()
    for m, found in enumerate(arnoldi(times(matrices), v, 5), start=1):
        basis = krylov_basis(matrices, v, m + 1)
        expected = basis.mT @ matrices @ basis[:, :, :m]
        assert found.shape == (2, m + 1, m)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert m == 5


def test_residuals_are_those_of_the_ritz_vectors():
    matrices, v = setting()
    *_, hessenberg = arnoldi(times(matrices), v, 5)
    values, residuals = ritz_values(hessenberg, 5)
    basis = krylov_basis(matrices, v, 5).to(values.dtype)
    exact, vectors = torch.linalg.eig(basis.mT @ matrices.to(values.dtype) @ basis)
    x = basis @ vectors
    away = torch.linalg.vector_norm(matrices.to(x.dtype) @ x - exact[:, None, :] * x, dim=1)
    assert (away > 1e-3).all()  # or zeros would do
    for sample in range(2):
        nearest = (values[sample][:, None] - exact[sample]).abs().argmin(dim=1)
        torch.testing.assert_close(residuals[sample], away[sample, nearest], rtol=1e-8, atol=0)


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exhausted_space(renew, dtype):
    """A reflection has two-dimensional Krylov spaces: it goes on in a new one, or keeps zeros."""
    _, v = setting()
    v = v.to(dtype)
    normal = normalise(torch.randn(2, 9, dtype=dtype))[0]
    reflections = torch.eye(9, dtype=dtype) - 2 * normal[:, :, None] * normal[:, None, :]
    *_, hessenberg = arnoldi(times(reflections), v, 9, renew=renew)
    values = torch.linalg.eigvals(hessenberg[:, :-1]).real.sort().values
    expected = [-1] + 8 * [1] if renew else [-1] + 7 * [0] + [1]
    expected = torch.tensor([expected, expected]).double()
    torch.testing.assert_close(values, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert (hessenberg[:, 2, 1] == 0).all()


def test_leading_ritz_values_are_eigenvalues_of_a_matrix_within_their_residuals():
    """t is one of A + E with ||E|| the residual, so A - t I is as near as that to singular."""
    matrices, v = setting(50)
    matrices = matrices / 50**0.5
    for steps in (6, 12, 24, 48):
        values, residuals = leading_ritz_values(times(matrices), v, 4, steps, tol=0)
        shifted = matrices[:, None] - values[:, :, None, None] * torch.eye(50)
        distances = torch.linalg.svdvals(shifted)[..., -1]
        assert (distances <= residuals + 1e-12).all()
    assert (residuals < 1e-3).all()


@pytest.mark.parametrize(
    ("k", "tol", "steps", "expected"),
    [
        (2, 1e-6, 100, 10),
        (2, 1e-12, 100, 20),
        (2, 1e-12, 7, 7),
        (2, 0, 100, 30),
        (6, 1e-3, 100, 10),  # of the largest modulus: the sixth is 1/32 of that
    ],
)
def test_tolerance_and_steps_limit_the_products(k, tol, steps, expected):
    """Looked at every ten steps, and at the last: more than D = 30 there cannot be."""
    _, v = setting(30)
    scale, points = 0.5 ** torch.arange(30.0, dtype=torch.float64), []
    if tol == 0:
        scale = torch.linspace(0, 1, 30, dtype=torch.float64)

    def product(x):
        points.append(x)
        return scale * x

    values, residuals = leading_ritz_values(product, v, k, steps, tol)
    assert len(points) == expected
    assert (residuals <= tol * values[:, :1].abs()).all() == (steps > 7)


# Name: a sample, and options with which its values still depend on the number of steps, or on
# the direction drawn after its Krylov space (of 4 dimensions) is exhausted.
UNFINISHED = {
    "steps": (torch.diag(0.5 ** torch.arange(40).double()), {"steps": 40, "tol": 1e-3}),
    "directions": (torch.block_diag(*10 * [setting(4)[0][0]]), {"steps": 6, "tol": 0}),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_sample_does_not_depend_on_the_others(name):
    sample, options = UNFINISHED[name]
    (slow, _), v = setting(40)
    found = []
    for other in (torch.eye(40), slow, torch.full((40, 40), torch.nan)):
        torch.manual_seed(1)
        product = times(torch.stack([sample, other.double()]))
        found.append(leading_ritz_values(product, v, 6, **options))
    for values, residuals in found[1:]:
        torch.testing.assert_close(values[0], found[0].values[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(residuals[0], found[0].residuals[0], rtol=1e-6, atol=1e-12)
    assert found[2].values[1].isnan().all()
    assert found[2].residuals[1].isnan().all()
