"""The implicit gradients of whole image models, in float64: every parameter, and the image.

Batch norm uses its running statistics, so that samples do not depend on each other.
"""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.layer_utils import list2vec, vec2list
from mdeq_vision.model import MDEQNet
from parameters import slow_but
from small_vision import (
    EQUILIBRIUM,
    STACKED,
    THRESHOLD,
    build,
    freeze_batch_norm,
    images,
    relative_error,
)

# Applications of f for the unrolled equilibrium: the spectral radii here are at most 0.75.
UNROLLED = 150
MODELS = {
    "2 branches": (2, {"WNORM": True, "DROPOUT": 0.2}),
    "4 branches": (4, {}),
}
by_model = pytest.mark.parametrize(("branches", "settings"), MODELS.values(), ids=MODELS)


def frozen(kind="cls", branches=2, **settings) -> MDEQNet:
    model = build(kind, branches, **settings)
    freeze_batch_norm(model)
    return model


def forward(model: MDEQNet, image: Tensor, train_step=EQUILIBRIUM, **options):
    """The output, with the same masks at every call."""
    torch.manual_seed(3)
    options = {"compute_jac_loss": False, "f_thres": THRESHOLD, "b_thres": THRESHOLD, **options}
    return model(image, train_step, **options)


def loss_of(output: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return (ramp * output).sum()


def gradients(loss: Tensor, image: Tensor, model: MDEQNet, **options) -> dict[str, Tensor]:
    names = ["image", *dict(model.named_parameters())]
    found = torch.autograd.grad(loss, [image, *model.parameters()], **options)
    return dict(zip(names, found, strict=True))


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert all(value.norm() > 1e-8 for value in expected.values())
    return max((relative_error(found[name], expected[name]), name) for name in expected)


def layer_of(model: MDEQNet, image: Tensor):
    """f on flat states, for the masks of ``forward``, and zero."""
    torch.manual_seed(3)
    injection = model.downsample(image)
    if model.stage0 is not None:
        injection = model.stage0(injection)
    height, width = injection.shape[2:]
    z0 = []
    for channels in model.channels:
        z0.append(torch.zeros(len(image), channels, height, width, dtype=image.dtype))
        height, width = (height + 1) // 2, (width + 1) // 2
    f, shapes = model.fullstage.prepare(injection, z0), [z.shape[1:] for z in z0]
    return (lambda z: list2vec(f(vec2list(z, shapes)))), list2vec(z0), shapes


def jacobians(f, point: Tensor) -> Tensor:
    """(B, D, D): samples do not depend on each other, so one product serves them all."""
    fz = f(point)
    rows = []
    for k in range(point.shape[1]):
        unit = torch.zeros_like(fz)
        unit[:, k] = 1
        rows.append(torch.autograd.grad(fz, point, unit, retain_graph=True)[0].squeeze(2))
    return torch.stack(rows, dim=1)


def each_once(*fast):
    """By default each kind and each model goes against one of the two references."""
    return pytest.mark.parametrize(
        ("kind", "variant"), slow_but(fast, product(("cls", "seg"), MODELS))
    )


@each_once(("cls", "2 branches"), ("seg", "4 branches"))
def test_against_the_dense_solve(kind, variant):
    """y' = g' (I - J)^-1 with the whole Jacobian, then one product through f."""
    branches, settings = MODELS[variant]
    model, image = frozen(kind, branches, **settings), images(8, 8).requires_grad_()
    found = gradients(loss_of(forward(model, image)[0]), image, model)

    f, z, shapes = layer_of(model, image)
    with torch.no_grad():
        solution = model.f_solver(f, z, threshold=THRESHOLD, stop_mode="rel")
    assert solution["rel_trace"][-1] < 1e-12
    point = solution["result"].requires_grad_()
    assert point.shape[1] <= 500
    jacobian = jacobians(f, point)
    # NumPy's solver: MKL's, behind torch.linalg, fails in a process that has set its number of
    # threads before (wrong pivots, or no end, with torch 2.13 and two threads).
    radius = np.abs(np.linalg.eigvals(jacobian.numpy())).max()
    (g,) = torch.autograd.grad(loss_of(model.head(vec2list(point, shapes))), point)
    identity = torch.eye(point.shape[1], dtype=point.dtype)
    transposed = (identity - jacobian).transpose(1, 2)
    adjoint = torch.from_numpy(np.linalg.solve(transposed.numpy(), g.numpy()))

    fz = f(point)
    through_f = gradients((fz * adjoint).sum(), image, model, materialize_grads=True)
    output = model.head(vec2list(point.detach(), shapes))
    of_the_head = gradients(loss_of(output) + 0 * image.sum(), image, model, materialize_grads=True)
    expected = {name: through_f[name] + of_the_head[name] for name in found}
    error, name = largest_error(found, expected)
    assert 0.3 < radius < 0.75
    assert error <= 1e-7, name


@each_once(("seg", "2 branches"), ("cls", "4 branches"))
def test_against_unrolled_autograd(kind, variant):
    branches, settings = MODELS[variant]
    model, image = frozen(kind, branches, **settings), images(8, 8).requires_grad_()
    found = gradients(loss_of(forward(model, image)[0]), image, model)
    model.n_layer = UNROLLED
    expected = gradients(loss_of(forward(model, image, STACKED)[0]), image, model)
    error, name = largest_error(found, expected)
    assert error <= 1e-7, name


@by_model
def test_evaluation_has_the_same_gradient(branches, settings):
    """Saliency maps are taken in evaluation; dropout off, so both modes compute the same."""
    model = frozen("cls", branches, **{**settings, "DROPOUT": 0.0})
    image = images(8, 8).requires_grad_()
    expected = gradients(loss_of(forward(model, image)[0]), image, model)
    found = gradients(loss_of(forward(model.eval(), image)[0]), image, model)
    assert largest_error(found, expected)[0] < 1e-8


# --- The Jacobian loss ------------------------------------------------------------------------


def by_definition(f, point: Tensor, vecs: int) -> Tensor:
    """The mean over vectors of ||v'J||^2 / numel, from the whole Jacobian."""
    jacobian = torch.autograd.functional.jacobian(lambda z: f(z).flatten(), point, True)
    jacobian = jacobian.reshape(point.numel(), point.numel())
    squares = [(torch.randn_like(point).flatten() @ jacobian).square().sum() for _ in range(vecs)]
    return sum(squares) / vecs / point.numel()


@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
def test_jacobian_loss(phase):
    """Two vectors, at a detached copy of the last state (or at z*): value and gradient."""
    model, image = frozen(NUM_CHANNELS=[4, 4], WNORM=True), images(2, 3).requires_grad_()
    torch.manual_seed(5)
    _, jac_loss, _ = model(image, phase, f_thres=THRESHOLD)
    assert jac_loss.shape == (1, 1)
    found = gradients(jac_loss.sum(), image, model, materialize_grads=True)

    f, z, _ = layer_of(model, image)
    with torch.no_grad():
        if phase == STACKED:
            for _ in range(model.n_layer):
                z = f(z)
        else:
            z = model.f_solver(f, z, threshold=THRESHOLD, stop_mode="rel")["result"]
    torch.manual_seed(5)
    expected = by_definition(f, z, vecs=2)
    wanted = gradients(expected, image, model, materialize_grads=True)
    torch.testing.assert_close(jac_loss.view(()), expected, rtol=1e-9, atol=0)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)
    head = ("incre_modules", "downsamp_modules", "final_layer", "classifier")
    assert all(found[name].norm() > 0 for name in found if name.endswith("conv1.weight_v"))
    assert not any(found[name].any() for name in found if name.startswith(head))


@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
def test_jacobian_loss_leaves_the_other_loss_alone(phase):
    """Output and its gradient are the same, bit for bit, with and without."""
    model, image = frozen(WNORM=True), images(4, 4).requires_grad_()
    results = []
    for compute in (False, True):
        output, jac_loss, _ = forward(model, image, phase, compute_jac_loss=compute)
        results.append((output, gradients(loss_of(output), image, model)))
        assert bool(jac_loss.any()) == compute
        assert jac_loss.requires_grad == compute
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_gradient_of_both_losses_is_the_sum():
    model, image = frozen(WNORM=True), images(4, 4).requires_grad_()
    for phase in (STACKED, EQUILIBRIUM):
        output, jac_loss, _ = forward(model, image, phase, compute_jac_loss=True)
        options = {"retain_graph": True, "materialize_grads": True}
        first = gradients(loss_of(output), image, model, **options)
        second = gradients(jac_loss.sum(), image, model, **options)
        both = gradients(loss_of(output) + 3 * jac_loss.sum(), image, model)
        for name, value in both.items():
            torch.testing.assert_close(value, first[name] + 3 * second[name], msg=name)


def test_jacobian_loss_is_of_training_with_autograd_alone():
    model, image = frozen(), images(4, 4)
    for phase in (STACKED, EQUILIBRIUM):
        with torch.no_grad():
            assert not forward(model, image, phase, compute_jac_loss=True)[1].any()
    model.eval()
    for phase in (STACKED, EQUILIBRIUM):
        assert not forward(model, image, phase, compute_jac_loss=True)[1].any()


# --- Forwards and backwards in any order ------------------------------------------------------


def test_two_pending_forwards():
    """Each has its own masks, weights and adjoint, whichever backward comes first."""
    model = frozen(**MODELS["2 branches"][1])
    first, second = images(4, 4).requires_grad_(), images(8, 4, seed=1).requires_grad_()
    wanted = []
    for image in (first, second):
        wanted.append(gradients(loss_of(forward(model, image)[0]), image, model))
    losses = [loss_of(forward(model, image)[0]) for image in (first, second)]
    for k, image in ((1, second), (0, first)):
        found = gradients(losses[k], image, model)
        for name, value in wanted[k].items():
            assert torch.equal(found[name], value), name


def test_pending_forward_of_the_other_phase():
    model, image = frozen(WNORM=True), images(4, 4).requires_grad_()
    wanted = gradients(loss_of(forward(model, image)[0]), image, model)
    loss = loss_of(forward(model, image)[0])
    forward(model, image, STACKED)
    with torch.no_grad():
        forward(model.eval(), image)
    found = gradients(loss, image, model)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_retained_graph():
    model, image = frozen(WNORM=True), images(4, 4).requires_grad_()
    loss = loss_of(forward(model, image)[0])
    first = gradients(loss, image, model, retain_graph=True)
    second = gradients(loss, image, model)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_second_derivative_is_refused():
    model, image = frozen(), images(4, 4).requires_grad_()
    found = gradients(loss_of(forward(model, image)[0]), image, model, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        found["image"].square().sum().backward()


@pytest.mark.parametrize("wnorm", [False, True])
def test_deepcopy_is_independent(wnorm):
    """After a training step, with held weights and masks: as averaging of weights does."""
    model, image = frozen(WNORM=wnorm, DROPOUT=0.2), images(4, 4).requires_grad_()
    loss_of(forward(model, image)[0]).backward()
    expected = gradients(loss_of(forward(model, image)[0]), image, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = gradients(loss_of(forward(twin, image)[0]), image, twin)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    changed = forward(model, image)[0]
    assert not torch.equal(changed, forward(twin, image)[0])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(changed, forward(twin, image)[0])
