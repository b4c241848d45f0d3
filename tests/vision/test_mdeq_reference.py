"""The MDEQ models against an independent implementation of their equations (float64)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.layer_utils import list2vec, vec2list
from mdeq_vision.model import MDEQNet
from parameters import slow_but
from reference_mdeq import Reference, resize_nearest
from small_vision import (
    EQUILIBRIUM,
    STACKED,
    THRESHOLD,
    TIGHT,
    build,
    images,
    relative_error,
    tiny_config,
)

# Every variant: (branches, image size, settings).
VARIANTS = {
    "1 branch": (1, (6, 5), {}),
    "1 branch, wnorm, 2 blocks": (1, (6, 6), {"WNORM": True, "NUM_BLOCKS": [2]}),
    "2 branches": (2, (8, 8), {}),
    "3 branches": (3, (8, 12), {}),
    "4 branches": (4, (16, 16), {}),
    "stem 1": (2, (8, 8), {"DOWNSAMPLE_TIMES": 1}),
    "stem 2": (3, (32, 16), {"DOWNSAMPLE_TIMES": 2}),
    "stem 3": (2, (32, 16), {"DOWNSAMPLE_TIMES": 3}),
    "stem 4": (1, (32, 32), {"DOWNSAMPLE_TIMES": 4}),
    "big kernels": (3, (8, 8), {"BIG_KERNELS": [0, 1, 2]}),
    "big kernels everywhere": (2, (4, 8), {"BIG_KERNELS": [2, 2], "NUM_BLOCKS": [2, 1]}),
    "expansion 5": (2, (4, 4), {"EXPANSION_FACTOR": 5}),
    "expansion 2.5": (2, (4, 4), {"EXPANSION_FACTOR": 2.5, "NUM_CHANNELS": [4, 8]}),
    "expansion rounded down": (1, (4, 4), {"EXPANSION_FACTOR": 1.7, "NUM_CHANNELS": [4]}),
    "wnorm": (4, (16, 8), {"WNORM": True}),
    "block not affine": (2, (8, 8), {"BLOCK_GN_AFFINE": False}),
    "fuse not affine": (3, (8, 8), {"FUSE_GN_AFFINE": False}),
    "post not affine": (2, (8, 12), {"POST_GN_AFFINE": False}),
    "2 blocks": (2, (8, 8), {"NUM_BLOCKS": [2, 2]}),
    "blocks differ": (3, (8, 8), {"NUM_BLOCKS": [1, 3, 2]}),
    "4 groups": (2, (8, 8), {"NUM_GROUPS": 4, "NUM_CHANNELS": [4, 8]}),
    "3 groups": (2, (8, 8), {"NUM_GROUPS": 3, "NUM_CHANNELS": [6, 3]}),  # 3 // 2 = 1 afterwards
    "dropout": (2, (8, 8), {"DROPOUT": 0.4, "NUM_BLOCKS": [2, 1]}),
    "residual identity": (2, (8, 8), {"NUM_CHANNELS": [12, 8], "HEAD_CHANNELS": [3, 2]}),
    "final kernel 3": (2, (8, 8), {"FINAL_CONV_KERNEL": 3}),
    "published form": (
        4,
        (32, 32),
        {
            "WNORM": True,
            "POST_GN_AFFINE": False,
            "DROPOUT": 0.2,
            "DOWNSAMPLE_TIMES": 2,
            "EXPANSION_FACTOR": 5,
            "NUM_CHANNELS": [4, 8, 12, 16],
        },
    ),
}
CASES = [
    (kind, name)
    for name in VARIANTS
    for kind in ("cls", "seg")
    if not (kind == "seg" and name.startswith("residual"))
    if not (kind == "cls" and name.startswith("final"))
]
# A constant added before a batch norm that subtracts the batch's mean changes nothing.
WITHOUT_EFFECT = {
    *(f"downsamp_modules.{i}.0.bias" for i in range(3)),
    "final_layer.0.bias",
    "last_layer.0.bias",
}


def masks_of(model: MDEQNet) -> dict[tuple[int, int], Tensor]:
    """The dropout masks of the last forward."""
    return {
        (i, k): block.drop.mask
        for i, branch in enumerate(model.fullstage.branches)
        for k, block in enumerate(branch.blocks)
        if block.drop.mask is not None
    }


def reference_of(model: MDEQNet, kind: str, cfg) -> Reference:
    """The reference with leaves equal to the model's numbers; call before the model's forward."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    momentum = {"cls": 0.1, "seg": 0.01}[kind]
    return Reference(state, cfg, batch_statistics=model.training, momentum=momentum)


def head_of(reference: Reference, kind: str):
    return {"cls": reference.cls_head, "seg": reference.seg_head}[kind]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_stacked(kind, variant, training):
    """Output, gradients of every parameter and of the image, and running statistics."""
    branches, size, settings = VARIANTS[variant]
    model, cfg = build(kind, branches, **settings), tiny_config(branches, **settings)
    model.train(training)
    reference = reference_of(model, kind, cfg)
    image, twin = images(*size).requires_grad_(), images(*size).requires_grad_()

    torch.manual_seed(0)  # the same masks at every run
    output, jac_loss, sradius = model(image, STACKED, compute_jac_loss=False)
    reference.masks = masks_of(model)
    assert bool(reference.masks) == (training and cfg.MODEL.DROPOUT > 0)
    expected = head_of(reference, kind)(reference.iterate(twin, cfg.MODEL.NUM_LAYERS)[0])
    assert output.shape == expected.shape
    assert (jac_loss.shape, sradius.shape) == ((1, 1), (2, 1))
    assert not jac_loss.any()
    assert not sradius.any()
    errors = {"output": (output - expected).abs().max().item()}

    direction = torch.linspace(-1, 1.5, output.numel(), dtype=torch.float64).view(output.shape)
    names = ["image", *dict(model.named_parameters())]
    found = torch.autograd.grad((direction * output).sum(), [image, *model.parameters()])
    leaves = [twin, *[reference.state[name] for name in names[1:]]]
    wanted = torch.autograd.grad((direction * expected).sum(), leaves)
    for name, a, b in zip(names, found, wanted, strict=True):
        if training and name in WITHOUT_EFFECT:
            errors[name] = (a - b).norm().item()
        else:
            assert b.norm() > 1e-8, name  # every parameter takes part
            errors[name] = relative_error(a, b)

    state = model.state_dict()
    assert bool(reference.running) == training
    for name, value in reference.running.items():
        errors[name] = (state[name] - value).abs().max().item()
    counted = {value.item() for key, value in state.items() if key.endswith("batches_tracked")}
    assert counted == {int(training)}

    unread = {k for k in state if not k.endswith("num_batches_tracked")} - reference.used
    assert not unread
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-8, worst


# By default each variant with one of the two heads, which test_stacked checks with all of them.
@pytest.mark.parametrize(
    ("kind", "variant"),
    slow_but(
        [case for case in CASES if case[0] == ("cls", "seg")[list(VARIANTS).index(case[1]) % 2]],
        CASES,
    ),
)
def test_equilibrium(kind, variant):
    """Against the reference's own f, solved by the same solver from zero.

    One model in training, where the head is given f(z*), the other in evaluation.
    """
    training = kind == "cls"
    branches, size, settings = VARIANTS[variant]
    model, cfg = build(kind, branches, **settings), tiny_config(branches, **settings)
    model.train(training)
    reference, image = reference_of(model, kind, cfg), images(*size)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(image, EQUILIBRIUM, f_thres=THRESHOLD)[0]
        assert model.deq.stats.forward.last["rel_residual"] < 1e-12
        reference.masks = masks_of(model)
        injection = reference.stem(image)
        zeros = reference.zeros(injection)
        shapes = [z.shape[1:] for z in zeros]

        def f(state: Tensor) -> Tensor:
            return list2vec(reference.f(vec2list(state, shapes), injection))

        solution = TIGHT(f, list2vec(zeros), threshold=THRESHOLD, stop_mode="rel")
        assert solution["rel_trace"][-1] < 1e-12
        expected = head_of(reference, kind)(vec2list(solution["result"], shapes))
    error = (output - expected).abs().max().item()
    assert error < 1e-8


@pytest.mark.parametrize(
    ("kind", "branches", "settings"),
    [("cls", 1, {}), ("seg", 2, {"WNORM": True}), ("cls", 4, {})],
    ids=["1 branch", "2 branches", "4 branches"],
)
def test_equilibrium_without_a_solver(kind, branches, settings):
    """These are contractions, so plain iteration ends at the fixed point too."""
    model, cfg = build(kind, branches, **settings).eval(), tiny_config(branches, **settings)
    reference, image = reference_of(model, kind, cfg), images(8, 8)
    with torch.no_grad():
        output = model(image, f_thres=THRESHOLD)[0]  # train_step's default is the equilibrium
        z, change = reference.iterate(image, 250)
        assert change < 1e-14
        error = (output - head_of(reference, kind)(z)).abs().max().item()
    assert error < 1e-8


SIZES = [(1, 1), (2, 9), (5, 7), (9, 16), (17, 33)]


@pytest.mark.parametrize("kind", ["cls", "seg"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("branches", "times"), [(1, 0), (3, 1), (4, 2)])
def test_any_size(kind, size, branches, times):
    """An odd side is rounded up at each halving; what is raised again loses its last row."""
    model = build(kind, branches, DOWNSAMPLE_TIMES=times).eval()
    reference = reference_of(model, kind, tiny_config(branches, DOWNSAMPLE_TIMES=times))
    with torch.no_grad():
        output = model(images(*size), STACKED)[0]
        expected = head_of(reference, kind)(reference.iterate(images(*size), 3)[0])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-8)
        assert model(images(*size), f_thres=8)[0].isfinite().all()
    if kind == "seg":
        assert output.shape[2:] == tuple(-(-side // 2**times) for side in size)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_divisible_sizes_are_resized_as_published(factor):
    """Nearest upsampling by a factor, where no row is left over."""
    x = torch.randn(2, 3, 3, 5)
    expected = F.interpolate(x, scale_factor=factor, mode="nearest")
    assert torch.equal(resize_nearest(x, factor, (3 * factor, 5 * factor)), expected)


def test_masks_of_one_forward():
    """One value per sample and channel, the same in all applications of f, anew per forward."""
    model = build("cls", 2, DROPOUT=0.4, NUM_BLOCKS=[2, 1], NUM_CHANNELS=[8, 16])
    torch.manual_seed(0)
    seen = {key: [] for key in [(0, 0), (0, 1), (1, 0)]}
    for (i, k), masks in seen.items():
        block = model.fullstage.branches[i].blocks[k]
        # z, and what was prepared: its last but one is the mask
        block.register_forward_hook(lambda _, args, out, masks=masks: masks.append(args[1][-2]))
    model(images(8, 8), EQUILIBRIUM, f_thres=5)
    first = masks_of(model)
    assert {key: tuple(mask.shape) for key, mask in first.items()} == {
        (0, 0): (2, 8, 1, 1),
        (0, 1): (2, 8, 1, 1),
        (1, 0): (2, 16, 1, 1),
    }
    for key, mask in first.items():
        assert len(seen[key]) >= 6
        assert all(one is mask for one in seen[key])
        assert set(mask.unique().tolist()) == {0.0, 1 / 0.6}
    assert not torch.equal(first[0, 0], first[0, 1])
    model(images(8, 8), STACKED)
    assert not torch.equal(first[0, 0], masks_of(model)[0, 0])
    model.eval()
    state = torch.get_rng_state()
    model(images(8, 8), f_thres=5)
    assert masks_of(model) == {}
    assert torch.equal(state, torch.get_rng_state())
