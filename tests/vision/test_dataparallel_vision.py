"""DataParallel for classification on pretended GPUs, by PyTorch's own functions."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from cases import the_same_vectors
from lib.data_parallel import BalancedDataParallel, shares
from pretended_machine import pretended_machine
from small_vision import EQUILIBRIUM, STACKED, build, freeze_batch_norm, images

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


@pytest.fixture
def on_gpus():
    """``on_gpus(model, n)`` -> the model on n pretended GPUs, as the trainer makes it."""
    with contextlib.ExitStack() as stack, the_same_vectors():

        def make(model, n):
            stack.enter_context(pretended_machine(n))
            return BalancedDataParallel(model.to("cuda:0"), -1, 0, (0, None, 0))

        yield make


def loss_and_grads(parallel, model, x, target, train_step, thres=400):
    """As in a step of the trainer."""
    model.zero_grad()
    device = next(model.parameters()).device
    x, target = x.to(device), target.to(device)
    output, jac_loss, sradius = parallel(
        x, train_step=train_step, compute_jac_loss=True, f_thres=thres, b_thres=thres
    )
    assert output.shape == (len(x), 5)
    assert sradius.shape == (len(x), 1)
    loss = F.cross_entropy(output, target, reduction="sum") / len(target)
    (loss + 2.0 * jac_loss.mean()).backward()
    grads = {name: p.grad.clone().cpu() for name, p in model.named_parameters()}
    return loss.item(), jac_loss.mean().item(), grads


@pytest.mark.parametrize(
    ("devices", "batch", "train_step", "wnorm"),
    [
        (2, 4, STACKED, True),
        (4, 2, STACKED, False),
        pytest.param(2, 4, EQUILIBRIUM, False, marks=pytest.mark.slow),
        (4, 2, EQUILIBRIUM, True),
    ],
)
def test_gradients_are_those_of_one_process(on_gpus, devices, batch, train_step, wnorm):
    """With as many samples as devices, more, and fewer."""
    model = build("cls", WNORM=wnorm, TRAIN__PRETRAIN_STEPS=1)
    freeze_batch_norm(model)  # in training, each replica normalises by its own samples
    x = images(8, 8, batch=batch)
    target = torch.arange(batch) % 5
    expected = loss_and_grads(model, model, x, target, train_step)
    found = loss_and_grads(on_gpus(model, devices), model, x, target, train_step)
    assert found[0] == pytest.approx(expected[0], abs=1e-10)
    assert found[1] == pytest.approx(expected[1], abs=1e-10)
    assert found[1] > 0
    for name, grad in expected[2].items():
        torch.testing.assert_close(found[2][name], grad, rtol=1e-7, atol=1e-10, msg=name)
    assert len(shares(batch, devices)) == devices


def test_statistics_of_all_replicas_are_counted(on_gpus):
    model = build("cls", TRAIN__PRETRAIN_STEPS=0)
    freeze_batch_norm(model)
    parallel = on_gpus(model, 3)
    loss_and_grads(parallel, model, images(8, 8, batch=6), torch.arange(6) % 5, EQUILIBRIUM, 4)
    assert model.deq.stats.forward.solves == 3
    assert model.deq.stats.backward.solves == 3


def test_dropout_differs_between_replicas(on_gpus):
    """The same image on both: each draws its own mask."""
    model = build("cls", DROPOUT=0.5, TRAIN__PRETRAIN_STEPS=1)
    freeze_batch_norm(model)
    x = images(8, 8, batch=1).expand(2, -1, -1, -1)
    parallel = on_gpus(model, 2)
    output, _, _ = parallel(x.to("cuda:0"), train_step=STACKED, compute_jac_loss=False)
    assert not torch.allclose(output[0], output[1])


def test_steps_leave_nothing_behind(on_gpus):
    """Several steps through replicas move the model itself."""
    model = build("cls", WNORM=True, TRAIN__PRETRAIN_STEPS=1)
    parallel = on_gpus(model.train(), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):  # through the border
        x = images(8, 8, batch=4).to("cuda:0")
        output, _, _ = parallel(x, train_step=step, f_thres=9, b_thres=9)
        optimizer.zero_grad()
        F.cross_entropy(output, torch.arange(4).to("cuda:0")).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all(name.endswith(".0.bias") for name in still)  # which batch norm makes superfluous
