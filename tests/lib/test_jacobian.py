"""Jacobian estimates against dense matrices."""

import doctest
import math

import pytest
import torch
from torch.autograd.function import once_differentiable

import lib.jacobian
from lib.errors import InputError
from lib.jacobian import (
    contraction_bound,
    jac_loss_estimate,
    jac_loss_weight_at,
    leading_eigenvalues,
    power_method,
    squared_frobenius_norm,
)
from problems import rotation, symmetric


def linear_pair(matrices, shape=None):
    """(f0, z0) of z -> A z per sample, A (B, D, D), with the state in any shape."""
    z0 = torch.randn(matrices.shape[:2], dtype=matrices.dtype)
    z0 = z0.reshape(shape or z0.shape).requires_grad_()
    f0 = torch.einsum("bij,bj->bi", matrices, z0.flatten(1)).view(z0.shape)
    return f0, z0


def gaussian(batch, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, size, generator=generator, dtype=torch.float64) / size**0.5


def turned(radius, angle):
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


# --- Jacobian loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 4), (3, 2, 2, 2)])
def test_expectation_is_the_frobenius_norm(shape):
    """||v'J||^2 has the mean ||J||_F^2 and the variance 2 ||J J'||_F^2: four standard errors."""
    torch.manual_seed(0)
    matrices, vecs = gaussian(3, 8), 2000
    found = jac_loss_estimate(*linear_pair(matrices, shape), vecs=vecs, create_graph=False)
    count = 3 * 8
    exact = matrices.square().sum() / count
    squares = matrices @ matrices.transpose(1, 2)
    error = (2 * squares.square().sum() / vecs).sqrt() / count
    assert 4 * error < 0.1 * exact  # or the test would show little
    assert abs(found - exact) < 4 * error


def test_estimate_is_the_mean_over_its_vectors():
    matrices = gaussian(2, 5)
    f0, z0 = linear_pair(matrices)
    torch.manual_seed(3)
    found = jac_loss_estimate(f0, z0, vecs=3)
    torch.manual_seed(3)
    draws = [torch.randn_like(f0) for _ in range(3)]
    expected = sum(torch.einsum("bi,bij->bj", v, matrices).square().sum() for v in draws) / 3 / 10
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.shape == ()


def test_gradient_flows():
    """d/dA of ||v'A||^2 / n is 2 v v'A / n."""
    weight = gaussian(1, 4)[0].requires_grad_()
    z0 = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    f0 = z0 @ weight.T
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(jac_loss_estimate(f0, z0, vecs=1), weight, retain_graph=True)
    torch.manual_seed(1)
    v = torch.randn_like(f0)[0]
    torch.testing.assert_close(found, 2 * torch.outer(v, v @ weight) / 4)
    assert not jac_loss_estimate(f0, z0, create_graph=False).requires_grad
    f0.sum().backward()  # the graph is still there


def test_loss_of_a_layer_that_ignores_its_state():
    z0 = torch.ones(2, 3, requires_grad=True)
    other = torch.ones(2, 3, requires_grad=True)
    assert jac_loss_estimate(other * 2, z0).item() == 0


@pytest.mark.parametrize(
    "function",
    [
        jac_loss_estimate,
        power_method,
        squared_frobenius_norm,
        leading_eigenvalues,
        contraction_bound,
    ],
)
def test_misuse(function):
    z0 = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(InputError, match=r"\(2, 2\).*\(2, 3\)"):
        function(z0[:, :2], z0)
    with pytest.raises(InputError, match="requires_grad_"):
        function(z0 * 2, torch.ones(2, 3))
    with pytest.raises(InputError, match="0"):
        function(z0 * 2, z0, 0)


# --- Frobenius norm ---------------------------------------------------------------------------


def variance_of_a_draw(matrices, vectors):
    """Of v'JJ'v, per sample: the closed forms."""
    products = matrices @ matrices.transpose(1, 2)
    total = products.square().sum(dim=(1, 2))
    if vectors == "rademacher":
        total = total - products.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return 2 * total


@pytest.mark.parametrize(
    ("dtype", "vectors"), [(torch.float64, "gaussian"), (torch.float32, "rademacher")]
)
def test_frobenius_norm_and_its_standard_error(vectors, dtype):
    torch.manual_seed(0)
    matrices = gaussian(3, 8) * torch.tensor([1.0, 2.0, 0.1]).double()[:, None, None]
    vecs = 2000
    found, error = squared_frobenius_norm(
        *linear_pair(matrices.to(dtype), (3, 2, 2, 2)), vecs, vectors=vectors
    )
    assert found.shape == error.shape == (3,)
    assert found.dtype == error.dtype == dtype
    exact = matrices.square().sum(dim=(1, 2))
    assert (4 * error < 0.1 * exact).all()  # or the next line would show little
    assert ((found - exact).abs() < 4 * error).all()
    expected = (variance_of_a_draw(matrices, vectors) / vecs).sqrt()
    torch.testing.assert_close(error.double(), expected, rtol=0.1, atol=0)


def test_rademacher_vectors_are_exact_for_a_diagonal_jacobian():
    diagonal = torch.linspace(-1, 2, 7, dtype=torch.float64)
    f0, z0 = linear_pair(torch.diag(diagonal)[None])
    exact = diagonal.square().sum().item()
    found, error = squared_frobenius_norm(f0, z0, vecs=2)
    assert found.item() == pytest.approx(exact, rel=1e-14)
    assert error.item() < 1e-14
    assert squared_frobenius_norm(f0, z0, vecs=2, vectors="gaussian").standard_error.item() > 0.01
    loss = jac_loss_estimate(f0, z0, vecs=1, vectors="rademacher")
    assert loss.item() == pytest.approx(exact / 7, rel=1e-14)


def test_misused_vectors():
    f0, z0 = linear_pair(gaussian(1, 3))
    for function in (jac_loss_estimate, squared_frobenius_norm):
        with pytest.raises(InputError, match=r"'normal'.* gaussian or rademacher") as caught:
            function(f0, z0, vectors="normal")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="vecs is 1, but must be an integer of at least 2"):
        squared_frobenius_norm(f0, z0, vecs=1)


# --- Power method -----------------------------------------------------------------------------


def block_diagonal(*blocks):
    return torch.block_diag(*blocks)[None]


def turned_basis(matrices):
    """The same eigenvalues in a basis where every product is rounded."""
    basis, _ = torch.linalg.qr(gaussian(1, matrices.shape[1], seed=5))
    return basis @ matrices.double() @ basis.transpose(1, 2)


SHIFT = torch.diag(torch.ones(4, dtype=torch.float64), 1)  # nilpotent: its fifth power is zero
# Name: matrices (B, D, D), relative tolerance.
JACOBIANS = {
    "real": (block_diagonal(turned(0.5, 1.0), torch.tensor([[0.9]]), turned(0.3, 2.0)), 1e-6),
    "negative": (torch.diag(torch.tensor([-0.8, 0.5, 0.1], dtype=torch.float64))[None], 1e-6),
    "complex pair": (block_diagonal(turned(1.5, 0.9), 0.8 * gaussian(1, 6)[0]), 1e-6),
    "real beside complex of one size": (
        block_diagonal(turned(0.9, 0.7), torch.tensor([[-0.9]])),
        1e-6,
    ),
    "not normal": (torch.tensor([[[0.5, 100.0], [0.0, 0.4]]], dtype=torch.float64), 1e-6),
    # The powers settle on one vector; directions that rounding adds to its Krylov space would
    # tell of the blocks' numerical range, 2.5.
    "one vector beside nilpotent blocks": (
        turned_basis(
            block_diagonal(torch.tensor([[0.9]]), *[torch.tensor([[0.0, 5.0], [0.0, 0.0]])] * 20)
        ),
        1e-6,
    ),
    "identity": (torch.eye(5, dtype=torch.float64)[None], 1e-10),
    "size 1": (torch.tensor([[[-0.7]]], dtype=torch.float64), 1e-10),
    "tiny": (1e-20 * gaussian(1, 6), 1e-6),
    "batch": (torch.stack([0.1 * gaussian(1, 8)[0], gaussian(1, 8, 1)[0], torch.eye(8)]), 1e-6),
    # The leading pairs of a random matrix lie close together: 1 % is what is promised.
    "random 300": (gaussian(2, 300), 1e-2),
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_spectral_radius(name):
    torch.manual_seed(0)
    matrices, tolerance = JACOBIANS[name]
    vector, radius = power_method(*linear_pair(matrices.double()))
    exact = torch.linalg.eigvals(matrices.double()).abs().amax(1, keepdim=True)
    error = ((radius - exact) / exact).abs().max().item()
    print(f"{name}: relative error {error:.1e}")
    assert radius.shape == (len(matrices), 1)
    assert error < tolerance
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(len(matrices)).double())


@pytest.mark.parametrize("n_iters", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("matrix", [SHIFT, torch.zeros(3, 3, dtype=torch.float64)])
def test_no_spectral_radius(matrix, n_iters):
    """Nilpotent: zero once the powers vanish, and never above the norm, 1."""
    vector, radius = power_method(*linear_pair(matrix[None]), n_iters=n_iters)
    assert 0 <= radius.item() <= (0 if n_iters == 40 or not matrix.any() else 1)
    assert torch.isfinite(vector).all()


class Counted(torch.autograd.Function):
    """The identity, and the number of products with its Jacobian so far."""

    products = 0

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.products += 1
        return grad


@pytest.mark.parametrize("n_iters", [1, 2, 5])
def test_no_more_products_than_asked_for(n_iters, monkeypatch):
    monkeypatch.setattr(Counted, "products", 0)
    z0 = torch.randn(2, 50, requires_grad=True)
    power_method(Counted.apply(z0) * torch.linspace(0, 1, 50), z0, n_iters=n_iters)
    assert Counted.products == n_iters


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    torch.manual_seed(0)
    matrices = gaussian(2, 12).to(dtype)
    vector, radius = power_method(*linear_pair(matrices, shape))
    exact = torch.linalg.eigvals(matrices.double()).abs().amax(1, keepdim=True)
    assert (vector.shape, vector.dtype, radius.dtype) == (shape, dtype, dtype)
    # The products are rounded to the dtype, and an eigenvalue is moved by that times its
    # condition number, ten at most here.
    tolerance = 1e-6 + 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(radius.double(), exact, rtol=tolerance, atol=0)


def test_nonlinear_map_at_a_point():
    torch.manual_seed(0)
    weight = gaussian(1, 6)[0]
    z0 = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    f0 = torch.tanh(z0 @ weight.T)
    radius = power_method(f0, z0)[1]
    jacobians = (1 - f0.detach().square())[:, :, None] * weight
    exact = torch.linalg.eigvals(jacobians).abs().amax(1, keepdim=True)
    torch.testing.assert_close(radius, exact, rtol=1e-6, atol=0)
    f0.sum().backward()  # the graph is still there
    assert z0.grad is not None


# --- Leading eigenvalues ----------------------------------------------------------------------


def by_falling_modulus(values):
    return values.gather(1, values.abs().argsort(dim=1, descending=True, stable=True))


def check_eigenvalues(found, matrices, tolerance):
    """Each is an eigenvalue of its own, and together they are the largest, in order."""
    exact = by_falling_modulus(torch.linalg.eigvals(matrices.double()))
    largest = exact[:, : found.shape[1]].abs()
    torch.testing.assert_close(found.abs().to(largest.dtype), largest, rtol=0, atol=tolerance)
    assert (found.abs().diff(dim=1) <= 0).all()
    for values, remaining in zip(found.tolist(), exact.tolist(), strict=True):
        for value in values:
            # Which of several of one modulus were found is open, and how many is not.
            nearest = min(remaining, key=lambda other, value=value: abs(other - value))
            assert abs(nearest - value) < tolerance
            remaining.remove(nearest)


# Name: matrices (B, D, D), k, absolute tolerance.
SPECTRA = {
    "symmetric": (symmetric().jacobian, 6, 1e-6),
    "complex pairs": (gaussian(3, 60), 6, 1e-5),
    "rotations of one angle": (rotation().jacobian, 6, 1e-10),
    "most steps by default": (gaussian(1, 300), 6, 1e-3),
    "more than a hundred": (gaussian(1, 130), 130, 1e-10),
    "zero": (torch.zeros(2, 9, 9, dtype=torch.float64), 9, 1e-300),
    "identity": (-2 * torch.eye(40, dtype=torch.float64)[None], 3, 1e-10),
    # Rounding by e moves the eigenvalues of a nilpotent block of size n to about e^(1/n).
    "nilpotent": (turned_basis(SHIFT[None]), 5, 1e-2),
    "nilpotent blocks beside one vector": (
        JACOBIANS["one vector beside nilpotent blocks"][0],
        3,
        1e-6,
    ),
    "not normal": (JACOBIANS["not normal"][0], 2, 1e-10),
    "size 1": (JACOBIANS["size 1"][0], 1, 1e-10),
    "different samples": (
        torch.stack(
            [
                gaussian(1, 12)[0],
                symmetric((1, 12)).jacobian[0],
                *rotation().jacobian[:1],
                torch.eye(12),
                torch.zeros(12, 12),
                torch.block_diag(SHIFT[:2, :2], torch.zeros(10, 10)),
            ]
        ),
        4,
        1e-6,
    ),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenvalues(name):
    torch.manual_seed(0)
    matrices, k, tolerance = SPECTRA[name]
    values, residuals = leading_eigenvalues(*linear_pair(matrices), k)
    assert values.shape == residuals.shape == (len(matrices), k)
    assert (values.dtype, residuals.dtype) == (torch.complex128, torch.float64)
    check_eigenvalues(values, matrices, tolerance)


def test_conjugate_pairs_lie_side_by_side():
    torch.manual_seed(0)
    values = leading_eigenvalues(
        *linear_pair(block_diagonal(turned(0.9, 1.0), turned(0.5, 2.0))), 4
    )
    angles = values.values.angle()[0].tolist()
    assert angles == pytest.approx([1.0, -1.0, 2.0, -2.0], abs=1e-10)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_of_spectra(shape, dtype):
    torch.manual_seed(0)
    matrices = gaussian(2, 12).to(dtype)
    f0, z0 = linear_pair(matrices, shape)
    with torch.no_grad():
        values, residuals = leading_eigenvalues(f0, z0, 5)
        norm, estimate = contraction_bound(f0, z0), squared_frobenius_norm(f0, z0).estimate
    real = torch.promote_types(dtype, torch.float32)
    assert values.dtype == real.to_complex()
    assert residuals.dtype == norm.dtype == estimate.dtype == real
    tolerance = 1e-6 + 10 * torch.finfo(dtype).eps  # as for the power method
    check_eigenvalues(values, matrices, tolerance)
    exact = torch.linalg.matrix_norm(matrices.double(), ord=2)
    torch.testing.assert_close(norm.double(), exact, rtol=tolerance, atol=0)
    f0.sum().backward()  # the graph is still there


def test_number_of_eigenvalues():
    f0, z0 = linear_pair(gaussian(1, 4))
    with pytest.raises(InputError, match="k is 5, but must be from 1 to 4"):
        leading_eigenvalues(f0, z0, 5)
    with pytest.raises(InputError, match="steps is 2, but must be an integer of at least 3"):
        leading_eigenvalues(f0, z0, 3, steps=2)


# --- Spectral norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SPECTRA, *JACOBIANS])
def test_spectral_norm(name):
    torch.manual_seed(0)
    matrices = (SPECTRA.get(name) or JACOBIANS.get(name))[0].double()
    found = contraction_bound(*linear_pair(matrices))
    exact = torch.linalg.matrix_norm(matrices, ord=2)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
    assert (found <= exact * (1 + 1e-14)).all()


def test_spectral_norm_bounds_the_spectral_radius():
    f0, z0 = linear_pair(gaussian(4, 20))
    assert (power_method(f0, z0)[1][:, 0] < 0.8 * contraction_bound(f0, z0)).all()


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_spectral_norm_from_below(steps):
    """Within the bound of failure that the docstring gives, 1e-3, on a spectrum without gaps."""
    torch.manual_seed(0)
    size = 400
    matrices = torch.diag(torch.linspace(0, 1, size, dtype=torch.float64).sqrt()).expand(20, -1, -1)
    found = contraction_bound(*linear_pair(matrices), steps=steps)
    root = math.log(1.648 * size**0.5 / 1e-3) / (2 * steps - 1)
    assert (found < 1).all()
    assert (found.square() > 1 - root**2).all()


def test_spectral_norm_of_a_nonlinear_map(monkeypatch):
    torch.manual_seed(0)
    weight = gaussian(1, 6)[0]
    z0 = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(Counted, "products", 0)
    f0 = torch.tanh(Counted.apply(z0) @ weight.T)
    found = contraction_bound(f0, z0, steps=9)
    assert Counted.products == 1 + 1 + 6  # for the start, for J, and in the steps
    jacobians = (1 - f0.detach().square())[:, :, None] * weight
    torch.testing.assert_close(found, torch.linalg.matrix_norm(jacobians, ord=2))
    assert contraction_bound(weight[:3].clone().requires_grad_(), z0).tolist() == [0, 0, 0]


def test_rounding_is_not_taken_for_a_wrong_double_backward():
    """With rank one, J'u nearly vanishes for some of a thousand random u."""
    torch.manual_seed(0)
    column = torch.randn(1000, 20, 1, dtype=torch.bfloat16)
    matrices = column @ torch.randn(1000, 1, 20, dtype=torch.bfloat16)
    found = contraction_bound(*linear_pair(matrices), steps=3)
    exact = torch.linalg.matrix_norm(matrices.double(), ord=2)
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0)


def test_spectral_norm_of_a_sample_that_is_not_finite():
    matrices = gaussian(2, 5)
    matrices[0, 1, 1] = torch.inf
    found = contraction_bound(*linear_pair(matrices))
    assert found[0].isnan()
    torch.testing.assert_close(found[1], torch.linalg.matrix_norm(matrices[1], ord=2))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2 * z


class Refused(Double):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Constant(Double):
    """A backward that autograd takes for a constant."""

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.detach()


@pytest.mark.parametrize(
    "layer", [Refused.apply, Constant.apply, lambda z: 3 * z + Constant.apply(z)]
)
def test_spectral_norm_without_double_backward(layer):
    z0 = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(InputError, match=r"twice differentiable.* use power_method") as caught:
        contraction_bound(layer(z0), z0)
    assert "\n" not in str(caught.value)
    assert leading_eigenvalues(layer(z0), z0, 1).values.abs().min() >= 1.99


def test_example_of_the_module():
    result = doctest.testmod(lib.jacobian)
    assert (result.failed, result.attempted) == (0, 9)


# --- Schedule of the loss weight --------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "every", "start", "from_start", "expected"),
    [
        (0, 10, 0, False, 1.0),
        (9, 10, 0, False, 1.0),
        (10, 10, 0, False, 1.1),
        (29, 10, 0, False, 1.2),
        (25, 10, 25, False, 1.0),  # pre-training does not count
        (29, 10, 25, False, 1.0),
        (30, 10, 25, False, 1.1),  # multiples of the step count, not of the steps since
        (30, 10, 30, False, 1.0),
        (34, 10, 25, True, 1.0),
        (35, 10, 25, True, 1.1),
        (3, 10, 25, True, 1.0),
        (1000, 0, 0, False, 1.0),
        (1000, -5, 0, True, 1.0),
    ],
)
def test_jac_loss_weight(step, every, start, from_start, expected):
    found = jac_loss_weight_at(step, 1.0, every, start, from_start=from_start)
    assert found == pytest.approx(expected, abs=1e-12)
