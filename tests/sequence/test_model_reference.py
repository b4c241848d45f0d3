"""The DEQ-Transformer against an independent implementation, and its gradients (float64)."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from deq_sequence import DEQTransformerLM
from lib.deq import DEQ
from lib.solvers import broyden
from parameters import slow_but
from problems import largest_relative_error
from reference_transformer import Reference

# Both solves end at 1e-12, four digits below what is asserted.
TIGHT = partial(broyden, eps=1e-12)
THRESHOLD = 200
# Applications of f for the unrolled equilibrium: the spectral radii here are at most 0.8.
UNROLLED = 110

BASE = {
    "n_token": 17,
    "n_layer": 3,
    "eval_n_layer": 5,
    "n_head": 2,
    "d_model": 8,
    "d_head": 4,
    "d_inner": 12,
    "dropout": 0.0,
    "dropatt": 0.0,
    "tgt_len": 5,
    "mem_len": 7,
    "pretrain_steps": 10,
    "f_solver": TIGHT,
}
VARIANTS = {
    "post-LN": {},
    "pre-LN": {"pre_lnorm": True},
    "wnorm": {"wnorm": True},
    "pre-LN, wnorm": {"pre_lnorm": True, "wnorm": True},
    "local": {"local_size": 3, "tie_weights": False},
    "local 2, no memory": {"local_size": 2, "mem_len": 0},
    "cutoffs": {"cutoffs": [4, 9]},
    "projected": {"d_embed": 6},
    "projected, tied": {"d_embed": 6, "tie_projs": [True]},
    "cutoffs, projected, some tied": {
        "cutoffs": [4, 9],
        "d_embed": 6,
        "tie_projs": [False, True, True],
    },
    "div_val 2": {"cutoffs": [4, 9], "div_val": 2, "tie_projs": [False, True]},
    "div_val 2, projected, untied": {
        "cutoffs": [4, 9],
        "div_val": 2,
        "d_embed": 12,
        "tie_weights": False,
    },
    "div_val 2, one cluster": {"div_val": 2, "tie_projs": [True]},
    "published form": {
        "cutoffs": [4, 9, 12],
        "div_val": 2,
        "tie_projs": [False, True, True, True],
        "wnorm": True,
        "pre_lnorm": True,
        "local_size": 6,
    },
}


def build(variant: str) -> tuple[DEQTransformerLM, dict]:
    """A model with weights large enough to matter, and small enough for a contraction."""
    settings = {**BASE, **VARIANTS[variant]}
    model = DEQTransformerLM(**settings).double()
    # The buffer was rounded to float32; the parameters' dtype is float64 now.
    k = torch.arange(0, model.d_model, 2, dtype=torch.float64)
    model.pos_emb.inv_freq.copy_(10000 ** (-k / model.d_model))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("weight_g"):  # norms of rows; of one row's direction, v tells nothing
            noise = 0.4 + 0.1 * noise
        elif not name.endswith("weight_v"):
            noise = noise * (0.3 if name.startswith(("word_emb", "inject", "crit")) else 0.15)
        parameter.data = noise
    with torch.no_grad():  # strong values hold the fixed point: the layer norm divides by them
        model.inject_conv.weight[2 * model.d_model :] *= 20
    return model, settings


def clone_parameters(model: nn.Module) -> tuple[dict, dict]:
    """Leaves equal to the model's parameters: by state-dict name (ties shared), and by name."""
    clones = {id(p): p.detach().clone().requires_grad_() for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    params = {key: clones[id(p)] for key, p in state.items() if id(p) in clones}
    return params, {name: clones[id(p)] for name, p in model.named_parameters()}


def segments(settings, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(settings["n_token"], (11, 2), generator=generator)
    return [(words[:5], words[1:6]), (words[5:10], words[6:11])]


CASES = [
    *product(VARIANTS, ["stacked", "equilibrium"], [True]),
    *product(["post-LN", "published form"], ["stacked", "equilibrium"], [False]),
]
# The others are of what is around the layer, in both phases the same.
LAYERS = ("post-LN", "pre-LN", "wnorm", "pre-LN, wnorm", "local", "local 2, no memory")


@pytest.mark.parametrize(
    ("variant", "phase", "training"),
    slow_but(
        [
            *(case for case in CASES if case[1] == "stacked" or case[0] in LAYERS),
            ("published form", "equilibrium", True),
        ],
        CASES,
    ),
)
def test_model_is_the_reference(variant, phase, training):
    """Two segments, the second with the first one's memory: losses, memories, gradients."""
    model, settings = build(variant)
    model.train(training)
    params, leaves = clone_parameters(model)
    reference = Reference(params, settings)
    step = 3 if phase == "stacked" else 10
    applications = settings["n_layer" if training else "eval_n_layer"]
    if phase == "equilibrium":
        applications = UNROLLED

    weights = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).view(5, 2)
    mems, expected_mems, total, expected_total, errors = [], [], 0, 0, []
    for data, target in segments(settings):
        loss, _, _, *mems = model(
            data, target, mems, train_step=step, f_thres=THRESHOLD, b_thres=THRESHOLD
        )
        expected, expected_mems = reference.forward(data, target, expected_mems, applications)
        errors.append((loss - expected).abs().max().item())
        for mem, expected_mem in zip(mems, expected_mems, strict=True):
            assert mem.shape == expected_mem.shape
            assert not mem.requires_grad
            if mem.numel():
                errors.append((mem - expected_mem).abs().max().item())
        total = total + (weights * loss).sum()
        expected_total = expected_total + (weights * expected).sum()
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(expected_total, list(leaves.values()), materialize_grads=True)
    assert list(leaves) == names
    for name, a, b in zip(names, found, wanted, strict=True):
        assert b.norm() > 0, name  # every parameter takes part
        errors.append(((a - b).norm() / b.norm()).item())
    print(f"{variant}, {phase}: largest error {max(errors):.1e}")
    assert max(errors) < 1e-8


@pytest.mark.parametrize("phase", ["stacked", "equilibrium"])
def test_extra_context_and_long_memory(phase):
    """data may be longer than target, and memory longer than a segment."""
    model, settings = build("published form")
    params, _ = clone_parameters(model)
    words = torch.randint(17, (9, 2), generator=torch.Generator().manual_seed(2))
    # The radius is larger with a long memory.
    step, applications = (0, 3) if phase == "stacked" else (-1, 2 * UNROLLED)
    mems, expected_mems = [], []
    for _ in range(3):
        loss, _, _, *mems = model(words[:-1], words[-2:], mems, step, THRESHOLD, THRESHOLD)
        expected, expected_mems = Reference(params, settings).forward(
            words[:-1], words[-2:], expected_mems, applications
        )
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(mems, expected_mems, rtol=0, atol=1e-8)


# --- The layer's implicit gradient ------------------------------------------------------------


@pytest.mark.parametrize("variant", ["post-LN", "pre-LN", "wnorm", "pre-LN, wnorm"])
def test_gradients_of_the_layer(variant):
    """Implicit against unrolled and against the dense (I - J)^-T, memory on."""
    model, _ = build(variant)
    layer = model.func
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    us, memory, z0 = draw(2, 9, 24), draw(2, 5, 8), torch.zeros(2, 4, 8, dtype=torch.float64)
    us = (4 * us).requires_grad_()
    inputs = [us, *layer.parameters()]
    direction = draw(z0.shape)

    def prepared():
        return layer.prepare(us, memory, model.pos_emb(9))

    deq = DEQ(TIGHT)
    z = deq(prepared(), z0, f_thres=THRESHOLD, b_thres=THRESHOLD).z
    found = torch.autograd.grad((direction * z).sum(), inputs)

    f, z = prepared(), z0
    for _ in range(UNROLLED):
        z = f(z)
    unrolled = torch.autograd.grad((direction * z).sum(), inputs)

    f, point = prepared(), z.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, point).view(64, 64)
    radius = torch.linalg.eigvals(jacobian).abs().max().item()
    system = torch.eye(64, dtype=torch.float64) - jacobian
    adjoint = torch.linalg.solve(system.T, direction.flatten()).view(z0.shape)
    dense = torch.autograd.grad(f(point), inputs, adjoint)
    errors = [largest_relative_error(found, expected) for expected in (unrolled, dense)]
    print(
        f"{variant}: spectral radius {radius:.2f}; relative error against unrolled, dense", errors
    )
    assert 0.1 < radius < 0.81  # UNROLLED applications are enough, and J matters
    assert max(errors) <= 1e-7
