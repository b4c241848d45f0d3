"""DataParallel for classification, with replicas on the CPU that stand for those on GPUs."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lib.deq
import lib.distributed
import mdeq_vision.model
from lib.distributed import BalancedDataParallel, shares
from small_vision import EQUILIBRIUM, STACKED, build, freeze_batch_norm, images

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


def replicate(network: nn.Module, devices, detach=False) -> list[nn.Module]:
    """As PyTorch's, which needs GPUs: shallow copies whose parameters are copies with a graph."""
    modules = list(network.modules())
    numbers = {module: i for i, module in enumerate(modules)}
    replicas = []
    for _ in devices:
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, copy in zip(modules, copies, strict=True):
            copy._former_parameters = {}
            for name, child in module._modules.items():
                copy._modules[name] = None if child is None else copies[numbers[child]]
                if child is not None:
                    setattr(copy, name, copies[numbers[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    copy._parameters[name] = None
                else:
                    value = parameter.detach() if detach else parameter
                    setattr(copy, name, value.clone())
                    copy._former_parameters[name] = value
            for name, buffer in module._buffers.items():
                copy._buffers[name] = None if buffer is None else buffer.clone()
        replicas.append(copies[0])
    return replicas


def parallel_apply(replicas, inputs, kwargs, devices):
    """Threads, as PyTorch's; autograd's mode is a thread's own."""
    outputs, grad = [None] * len(replicas), torch.is_grad_enabled()

    def work(i):
        with torch.set_grad_enabled(grad):
            outputs[i] = replicas[i](*inputs[i], **kwargs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs


def ones_jac_loss(f0, z0, vecs=2, create_graph=True):
    """The estimate with a vector of ones: the real one draws for each replica."""
    (product,) = torch.autograd.grad(f0.sum(), z0, create_graph=True)
    return product.square().sum() / z0.numel()


@pytest.fixture
def stand_ins(monkeypatch):
    """``stand_ins(model, n)`` -> the model on n devices, as the trainer makes it."""
    monkeypatch.setattr(lib.distributed, "replicate", replicate)
    monkeypatch.setattr(lib.distributed, "parallel_apply", parallel_apply)
    monkeypatch.setattr(
        lib.distributed, "gather", lambda parts, device, dim: torch.cat(list(parts), dim)
    )
    monkeypatch.setattr(lib.deq, "jac_loss_estimate", ones_jac_loss)
    monkeypatch.setattr(mdeq_vision.model, "jac_loss_estimate", ones_jac_loss)

    def make(model, n):
        parallel = BalancedDataParallel(model, -1, 0, (0, None, 0))
        parallel.dim = 0  # PyTorch's own constructor stops before this where there is no GPU
        parallel.device_ids, parallel.output_device = ["cpu"] * n, "cpu"
        return parallel

    return make


def loss_and_grads(parallel, model, x, target, train_step):
    """As in a step of the trainer."""
    model.zero_grad()
    output, jac_loss, sradius = parallel(
        x, train_step=train_step, compute_jac_loss=True, f_thres=400, b_thres=400
    )
    assert output.shape == (len(x), 5)
    assert sradius.shape == (len(x), 1)
    loss = F.cross_entropy(output, target, reduction="sum") / len(target)
    (loss + 2.0 * jac_loss.mean()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.item(), jac_loss.mean().item(), grads


@pytest.mark.parametrize("wnorm", [False, True], ids=["plain", "wnorm"])
@pytest.mark.parametrize("train_step", [STACKED, EQUILIBRIUM], ids=["stacked", "equilibrium"])
@pytest.mark.parametrize(("devices", "batch"), [(2, 4), (4, 2)])
def test_gradients_are_those_of_one_process(stand_ins, devices, batch, train_step, wnorm):
    """With as many samples as devices, more, and fewer."""
    model = build("cls", WNORM=wnorm, TRAIN__PRETRAIN_STEPS=1)
    freeze_batch_norm(model)  # in training, each replica normalises by its own samples
    x = images(8, 8, batch=batch)
    target = torch.arange(batch) % 5
    expected = loss_and_grads(model, model, x, target, train_step)
    found = loss_and_grads(stand_ins(model, devices), model, x, target, train_step)
    assert found[0] == pytest.approx(expected[0], abs=1e-10)
    assert found[1] == pytest.approx(expected[1], abs=1e-10)
    assert found[1] > 0
    for name, grad in expected[2].items():
        torch.testing.assert_close(found[2][name], grad, rtol=1e-7, atol=1e-10, msg=name)
    assert len(shares(batch, devices)) == devices


def test_statistics_of_all_replicas_are_counted(stand_ins):
    model = build("cls", TRAIN__PRETRAIN_STEPS=0)
    freeze_batch_norm(model)
    parallel = stand_ins(model, 3)
    loss_and_grads(parallel, model, images(8, 8, batch=6), torch.arange(6) % 5, EQUILIBRIUM)
    assert model.deq.stats.forward.solves == 3
    assert model.deq.stats.backward.solves == 3


def test_dropout_differs_between_replicas(stand_ins):
    """The same image on both: each draws its own mask."""
    model = build("cls", DROPOUT=0.5, TRAIN__PRETRAIN_STEPS=1)
    freeze_batch_norm(model)
    x = images(8, 8, batch=1).expand(2, -1, -1, -1)
    output, _, _ = stand_ins(model, 2)(x, train_step=STACKED, compute_jac_loss=False)
    assert not torch.allclose(output[0], output[1])


def test_steps_leave_nothing_behind(stand_ins):
    """Several steps through replicas move the model itself."""
    model = build("cls", WNORM=True, TRAIN__PRETRAIN_STEPS=2)
    parallel = stand_ins(model.train(), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):  # through the border
        output, _, _ = parallel(images(8, 8, batch=4), train_step=step, f_thres=9, b_thres=9)
        optimizer.zero_grad()
        F.cross_entropy(output, torch.arange(4)).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all(name.endswith(".0.bias") for name in still)  # which batch norm makes superfluous
