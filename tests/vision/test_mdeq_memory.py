"""What an image model keeps between forward and backward, and from step to step."""

import gc
from functools import partial

import pytest
import torch

from lib.solvers import SOLVERS
from measures import saved_bytes
from small_vision import EQUILIBRIUM, STACKED, build, images


@pytest.mark.parametrize("kind", ["cls", "seg"])
@pytest.mark.parametrize("name", ["broyden", "anderson"])
@pytest.mark.parametrize("jac", [False, True], ids=["", "jacobian loss"])
def test_saved_bytes_do_not_grow_with_iterations(kind, name, jac):
    """One evaluation of f, and head and stem; a stacked network of one layer saves as much."""
    model = build(kind, 3, WNORM=True, DROPOUT=0.2, NUM_LAYERS=1)
    model.f_solver = partial(SOLVERS[name], eps=0.0)
    image, found, nfe = images(16, 16), [], []
    for f_thres in (5, 10, 20):
        step = partial(model, image, EQUILIBRIUM, compute_jac_loss=jac, f_thres=f_thres)
        found.append(saved_bytes(step))
        nfe.append(model.deq.stats.forward.last["nfe"])
    print(f"{kind}, {name}: f_thres 5, 10, 20: {found} bytes saved, {nfe} evaluations")
    assert len(set(found)) == 1
    assert nfe == sorted(set(nfe))
    if not jac:
        one_layer = saved_bytes(lambda: model(image, STACKED, compute_jac_loss=False))
        assert abs(found[0] - one_layer) < 0.02 * one_layer  # flattening the state saves nothing


def test_stacked_phase_grows_with_its_layers():
    """So that the test above shows something."""
    found = []
    for layers in (1, 2, 3):
        model = build("cls", 3, NUM_LAYERS=layers)
        found.append(saved_bytes(lambda model=model: model(images(16, 16), STACKED)))
    assert found[2] - found[1] == found[1] - found[0] > 0


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def step_train(model, image):
    output, jac_loss, _ = model(image, EQUILIBRIUM, f_thres=3, b_thres=3)
    (output.square().sum() + 0.1 * jac_loss.sum()).backward()


def step_stacked(model, image):
    output, jac_loss, _ = model(image, STACKED)
    (output.square().sum() + 0.1 * jac_loss.sum()).backward()


@pytest.mark.parametrize("kind", ["cls", "seg"])
def test_a_step_leaves_no_graph_behind(kind):
    """Normalised weights are as large as the parameters: they must go with the step's graph."""
    model, image = build(kind, 3, WNORM=True), images(16, 16)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects()}
    step_train(model, image)
    gc.collect()
    new = [t for t in gc.get_objects() if id(t) not in before and type(t) is torch.Tensor]
    assert [tuple(t.shape) for t in new if t.grad_fn is not None] == []


def step_forward_only(model, image):
    model(image, EQUILIBRIUM, f_thres=3)


def step_evaluation(model, image):
    model.eval()
    with torch.no_grad():
        model(image, f_thres=3, spectral_radius_mode=model.deq.stats.forward.solves % 50 == 0)
    model.train()


STEPS = [step_train, step_stacked, step_forward_only, step_evaluation]


@pytest.mark.filterwarnings("ignore:the adjoint")  # the solves are short on purpose
def test_60_steps_leave_nothing():
    """Of all kinds by turns: what any of them left behind would be there 10 times."""
    model, image = build("cls", 2, WNORM=True, DROPOUT=0.2, NUM_LAYERS=2), images(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for number in range(60):
        STEPS[number % len(STEPS)](model, image)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if number == 19:  # what is allocated once is there by now
            tensors = live_tensors()
    assert live_tensors() <= tensors
