"""All solvers, gradients, Jacobian tools and both models on a GPU: a pretended one, or a real one.

No devices mix, digits are the CPU's, and the host waits for the GPU as seldom as the rules below
say: each wait leaves a GPU without work.
"""

import contextlib
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import small_model
import small_vision
from lib.deq import DEQ
from lib.graphs import Graphs
from lib.jacobian import contraction_bound, jac_loss_estimate, leading_eigenvalues, power_method
from lib.optimization import normalised
from lib.solvers import SOLVERS
from lib.solvers.krylov import bicgstab, gmres
from lib.solvers.maps import Affine
from pretended_gpu import PretendedGpu
from toy_layers import Toy

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")

# The rule: a solve reads from the GPU once for each check of its residual, and at no other time.
# Methods that orthogonalise on the host read their products as well.
PER_CHECK = {"newton_krylov": 2, "gmres": 3, "bicgstab": 3}
# Beyond that, a pass of a DEQ reads what its statistics say, and the norm of the gradient.
PER_PASS = 3
GRADIENTS = """
    ift shine shine:refine=2 jfb phantom phantom:form=neumann reversible unroll
    unroll:checkpointing=true
""".split()


class DrawnOnCpu(TorchFunctionMode):
    """Random numbers of a GPU are those that the CPU would draw."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.randn_like, Tensor.bernoulli_):
            return func(*args, **kwargs)
        drawn = func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs)
        return drawn.to(args[0].device) if func is torch.randn_like else args[0].copy_(drawn)


def on_both(real: bool, run, exact: bool = True) -> PretendedGpu | None:
    """``run(device)`` on the CPU and on a GPU: equal tensors; what a pretended one counted.

    Not ``exact``: PyTorch computes some operations in other pieces for a tensor of a subclass.
    """
    expected = run("cpu")
    with contextlib.nullcontext() if real else PretendedGpu() as gpu:
        with DrawnOnCpu() if real else contextlib.nullcontext():
            found = run("cuda:0")
        assert all(tensor.is_cuda for tensor in found)
        waits = None if real else gpu.waits.copy()
        found = [tensor.detach().cpu() for tensor in found]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(b).all()
        if exact and not real:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b.detach(), rtol=1e-6 if real else 1e-9, atol=1e-10)
    if gpu is not None:
        gpu.waits = waits
    return gpu


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def both(request):
    return partial(on_both, request.param == "real")


def check_reads(gpu: PretendedGpu | None, most: int, least: int = 0, path: str = "lib/") -> None:
    """How often files of that path read from the GPU; what lib gives it, it gives without wait."""
    if gpu is not None:
        assert gpu.count("upload", "lib/") == 0, gpu.waits
        assert least <= gpu.count("read", path) <= most, gpu.waits


def toy(device) -> Toy:
    layer = Toy()
    layer.z0 = layer.z0.to(device)
    return layer.to(device)


# ---- solvers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in SOLVERS
        for options in (
            {},
            {"check_every": 4},
            {"check_every": 6, "threshold": 6},
            {"stop": "sample"},
        )
        if name != "newton_krylov" or "check_every" not in options  # of which it takes no notice
    ],
    ids=str,
)
def test_forward_solvers(both, name, options):
    solutions = []

    def run(device):
        layer = toy(device)
        solution = SOLVERS[name](layer, layer.z0, **{"threshold": 30, "eps": 1e-10} | options)
        solutions.append(solution)
        return [solution[key] for key in ("result", "converged", "residual", "sample_nfe")]

    gpu = both(run)
    first, second = solutions
    if gpu is not None:
        assert first["abs_trace"] == second["abs_trace"]
    every = options.get("check_every", 1)
    # The first one is looked at by itself, unless all are looked at in the end.
    first = int(every < second["threshold"])
    checks = math.ceil((second["nfe"] - first) / every) + first + second["products"]
    check_reads(gpu, PER_CHECK.get(name, 1) * checks)


@pytest.mark.parametrize("solver", [gmres, bicgstab])
def test_linear_solvers(both, solver):
    solutions = []

    def run(device):
        layer = toy(device)
        affine = Affine(lambda v: v @ layer.w.detach(), layer.x.detach())
        solutions.append(solver(affine, layer.z0, threshold=30, eps=1e-10))
        return [solutions[-1]["result"]]

    gpu = both(run)
    checks = solutions[-1]["nfe"] + solutions[-1]["products"]
    check_reads(gpu, PER_CHECK[solver.__name__] * checks)


# ---- gradients ---------------------------------------------------------------------------------


def differentiate(device, layer, deq, **thresholds):
    torch.manual_seed(0)
    z = deq(layer, layer.z0, f_thres=16, b_thres=30, **thresholds).z
    z.square().sum().backward()
    return [z, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("grad", GRADIENTS)
def test_gradients(both, grad):
    deqs = []

    def run(device):
        deqs.append(DEQ(f_solver="broyden", b_solver="broyden", grad=grad))
        return differentiate(device, toy(device), deqs[-1])

    gpu = both(run)
    stats = deqs[-1].stats
    evaluations, passes = (
        sum(getattr(s, field) for s in (stats.forward, stats.backward))
        for field in ("nfe", "solves")
    )
    check_reads(gpu, evaluations + PER_PASS * passes)


@pytest.mark.parametrize(
    ("f_solver", "b_solver"),
    [
        ("anderson", "gmres"),
        ("fixed_point_iteration", "bicgstab"),
        ("newton_krylov", "anderson"),
        ("broyden:stop=sample", "gmres:restart=4"),
    ],
)
def test_solvers_of_both_passes(both, f_solver, b_solver):
    both(lambda device: differentiate(device, toy(device), DEQ(f_solver, b_solver)))


# ---- Jacobian tools ------------------------------------------------------------------------------


def at_a_point(device):
    layer = toy(device)
    torch.manual_seed(0)
    z = layer.z0.clone().requires_grad_()
    return layer(z), z


def test_jacobian_tools(both):
    def run(device):
        f, z = at_a_point(device)
        return [
            jac_loss_estimate(f, z),
            jac_loss_estimate(f, z, vecs=2, vectors="rademacher"),
            *power_method(f, z, 20),
            contraction_bound(f, z),
        ]

    # The linear map of contraction_bound is tried once; the eigenvalues' space is asked, per
    # step, whether it is exhausted.
    check_reads(both(run, exact=False), 2)


def test_leading_eigenvalues(both):
    both(lambda device: [*leading_eigenvalues(*at_a_point(device), 3)], exact=False)


def test_weight_norm_in_float64(both):
    """PyTorch's fused kernel of a GPU takes the norms in float32."""

    def run(device):
        torch.manual_seed(0)
        v, g = torch.randn(5, 3, 2).double(), torch.randn(5, 1, 1).double()
        v, g = (t.to(device).requires_grad_() for t in (v, g))
        w = normalised(v, g, 0)
        return [w, *torch.autograd.grad(w.square().sum(), (v, g))]

    both(run, exact=False)
    v, g = torch.randn(5, 3).double(), torch.ones(5, 1).double()
    expected = v / v.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(normalised(v, g, 0), expected, rtol=1e-14, atol=0)


# ---- models --------------------------------------------------------------------------------------

THRESHOLDS = {"f_thres": 6, "b_thres": 5}  # few: this is no contraction, and rounding grows


def check_reads_of_a_step(model, gpu):
    stats = model.deq.stats
    evaluations = stats.forward.nfe + stats.backward.nfe
    passes = stats.forward.solves + stats.backward.solves
    assert passes == 2
    check_reads(gpu, evaluations + PER_PASS * passes, evaluations)


@pytest.mark.parametrize("vocabulary", ["narrow clusters", "projected"])
def test_language_model(both, vocabulary):
    """A stacked step and one at equilibrium, with memory, forward and backward.

    Its own wait in a step: how many words are in each cluster, for embedding and softmax.
    """
    models = []

    def run(device):
        model = small_model.build(wnorm=True, **small_model.VOCABULARIES[vocabulary])
        models.append(model.double().to(device))
        data, target = (t.to(device) for t in small_model.words())
        mems, found = [], []
        for step in (small_model.STACKED, small_model.EQUILIBRIUM):
            model.zero_grad()
            torch.manual_seed(0)
            loss, jac_loss, _, *mems = model(data, target, mems, train_step=step, **THRESHOLDS)
            (loss.mean() + jac_loss.mean()).backward()
            found += [loss, jac_loss, *mems, *(p.grad for p in model.parameters())]
        return found

    gpu = both(run, exact=False)
    check_reads_of_a_step(models[-1], gpu)
    check_reads(gpu, 2 * len(("stacked", "equilibrium")), path="DEQ-Sequence/")


@pytest.mark.parametrize("kind", ["cls", "seg"])
def test_image_models(both, kind):
    """A stacked step and one at equilibrium, forward and backward."""
    models = []

    def run(device):
        model = small_vision.build(kind, WNORM=True)
        model.f_solver = model.b_solver = "broyden"
        models.append(model.to(device))
        x, found = small_vision.images(8, 8).to(device), []
        for step in (small_vision.STACKED, small_vision.EQUILIBRIUM):
            model.zero_grad()
            torch.manual_seed(0)
            output, jac_loss, _ = model(x, train_step=step, compute_jac_loss=True, **THRESHOLDS)
            (output.square().mean() + jac_loss.mean()).backward()
            found += [output, jac_loss, *(p.grad for p in model.parameters())]
        return found

    gpu = both(run, exact=False)
    check_reads_of_a_step(models[-1], gpu)
    check_reads(gpu, 0, path="MDEQ-Vision/")


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", ["words", "cls", "seg"])
def test_graphs(kind, amp):
    """Some steps with CUDA graphs and without: the same loss and gradients up to rounding."""

    def run(graphs):
        model, forward = (words if kind == "words" else images)(kind)
        model.deq.graphs = graphs
        optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(step)
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                output, jac_loss = forward(step)
            (output.float().square().mean() + jac_loss.float().sum()).backward()
            found += [output.detach().float(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
        return found

    def words(kind):
        model, mems = small_model.build(wnorm=True, dropout=0.1).to("cuda"), []

        def forward(step):
            data = (t.to("cuda") for t in small_model.words(seed=step))
            loss, jac_loss, _, *mems[:] = model(*data, [*mems], **THRESHOLDS)
            return loss, jac_loss

        return model, forward

    def images(kind):
        model = small_vision.build(kind, WNORM=True, DROPOUT=0.1).float().to("cuda")
        model.f_solver = model.b_solver = "broyden"
        x = small_vision.images(8, 8).float().to("cuda")
        return model, lambda step: model(x, compute_jac_loss=True, **THRESHOLDS)[:2]

    graphs = Graphs()
    expected, found = run(None), run(graphs)
    assert graphs._forms
    assert None not in graphs._forms.values()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if not amp else 0.1, atol=1e-4 + 0.05 * amp)


def test_numbers_drawn_on_the_cpu():
    """What the tests on a real GPU rely on, tried on a pretended one."""
    torch.manual_seed(0)
    expected = [torch.randn(3), torch.empty(3).bernoulli_(0.5)]
    with PretendedGpu(), DrawnOnCpu():
        torch.manual_seed(0)
        x = torch.empty(3, device="cuda")
        found = [torch.randn_like(x), x.bernoulli_(0.5)]
        assert found[1] is x
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
