"""Jacobian estimates against dense matrices."""

import math

import pytest
import torch

from lib.errors import InputError
from lib.jacobian import jac_loss_estimate, jac_loss_weight_at, power_method


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


@pytest.mark.parametrize("function", [jac_loss_estimate, power_method])
def test_misuse(function):
    z0 = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(InputError, match=r"\(2, 2\).*\(2, 3\)"):
        function(z0[:, :2], z0)
    with pytest.raises(InputError, match="requires_grad_"):
        function(z0 * 2, torch.ones(2, 3))
    with pytest.raises(InputError, match="0"):
        function(z0 * 2, z0, 0)


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


@pytest.mark.parametrize("n_iters", [1, 2, 5])
def test_no_more_products_than_asked_for(n_iters):
    class Counted(torch.autograd.Function):
        products = 0

        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            Counted.products += 1
            return grad

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
