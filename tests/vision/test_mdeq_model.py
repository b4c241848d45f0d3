"""The image models as objects: phases, defaults, independence, and what they refuse."""

import builtins
import random

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.solvers import anderson, broyden, fixed_point_iteration
from mdeq_vision import get_cls_net, get_seg_net
from mdeq_vision.config import config
from small_vision import EQUILIBRIUM, NETS, STACKED, build, images, tiny_config

by_kind = pytest.mark.parametrize("kind", ["cls", "seg"])
FLOAT = torch.float32


def plain(kind="cls", branches=2, **changes):
    """In float32 with the solvers of the configuration."""
    return NETS[kind](tiny_config(branches, **changes))


# --- Phases and results -----------------------------------------------------------------------


@by_kind
@pytest.mark.parametrize(
    ("step", "solves"), [(0, 0), (9, 0), (10, 1), (11, 1), (10**9, 1), (-1, 1), (None, 1)]
)
@pytest.mark.parametrize("training", [True, False])
def test_border_of_the_phases(kind, step, solves, training):
    """train_step below PRETRAIN_STEPS = 10 stacks; at it, above it, -1 and by default it solves."""
    model = plain(kind).train(training)
    options = {} if step is None else {"train_step": step}
    model(images(8, 8, dtype=FLOAT), **options)
    assert model.deq.stats.forward.solves == solves


@by_kind
def test_no_pretraining(kind):
    model = plain(kind, TRAIN__PRETRAIN_STEPS=0)
    model(images(8, 8, dtype=FLOAT), 0)
    assert model.deq.stats.forward.solves == 1


@by_kind
def test_applications_of_f(kind):
    """NUM_LAYERS while stacked, and one more for the Jacobian loss."""
    model, calls = plain(kind), []
    model.fullstage.register_forward_hook(lambda *_: calls.append(1))
    image = images(8, 8, dtype=FLOAT)
    for compute, expected in ((False, 3), (True, 4)):
        calls.clear()
        model(image, STACKED, compute_jac_loss=compute)
        assert len(calls) == expected
    calls.clear()
    model(image, f_thres=7)  # an update more than evaluations, and the one that is differentiated
    assert len(calls) == model.deq.stats.forward.last["nfe"] + 1 <= 9


@by_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
def test_shapes_of_the_results(kind, training, phase):
    model = plain(kind, 3, DOWNSAMPLE_TIMES=1).train(training)
    output, jac_loss, sradius = model(images(10, 7, batch=3, dtype=FLOAT), phase)
    assert output.shape == ((3, 5) if kind == "cls" else (3, 4, 5, 4))
    assert (jac_loss.shape, sradius.shape) == ((1, 1), (3, 1))
    assert {t.dtype for t in (output, jac_loss, sradius)} == {FLOAT}
    assert bool(jac_loss.any()) == training
    assert not sradius.any()


@by_kind
def test_deterministic(kind):
    """Two evaluations are equal bit for bit, and draw no random number."""
    model, image = plain(kind, DROPOUT=0.3).eval(), images(8, 8, dtype=FLOAT)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(image)[0], model(image)[0])
    assert torch.equal(model(image)[0], model(image)[0])
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        without_autograd = model(image)[0]
    assert torch.equal(without_autograd, model(image)[0])


@by_kind
def test_spectral_radius(kind):
    """It changes no output; it is of z*, one number per sample."""
    model, image = build(kind, WNORM=True).eval(), images(8, 8)
    with torch.no_grad():
        plain_output = model(image)[0]
        torch.manual_seed(0)
        output, _, sradius = model(image, spectral_radius_mode=True)
    assert torch.equal(output, plain_output)
    assert sradius.shape == (2, 1)
    assert (sradius > 0.3).all()
    assert (sradius < 0.8).all()
    with torch.no_grad():
        one = model(image[1:], spectral_radius_mode=True)[2]
    torch.testing.assert_close(one, sradius[1:], rtol=1e-4, atol=0)


def test_spectral_radius_is_of_evaluation_at_equilibrium():
    model, image = plain(), images(8, 8, dtype=FLOAT)
    assert not model(image, EQUILIBRIUM, spectral_radius_mode=True)[2].any()
    assert not model(image, STACKED, spectral_radius_mode=True)[2].any()
    assert not model.eval()(image, STACKED, spectral_radius_mode=True)[2].any()
    assert model(image, spectral_radius_mode=True)[2].all()


def test_samples_do_not_depend_on_each_other():
    """In evaluation, once the solver has converged."""
    model, image = build("seg", 4).eval(), images(8, 8, batch=3)
    with torch.no_grad():
        together = model(image)[0]
        for k in range(3):
            torch.testing.assert_close(model(image[k : k + 1])[0], together[k : k + 1])


def test_thresholds():
    """Those of the configuration, unless they are given."""
    model, image = plain(DEQ__F_THRES=4, DEQ__B_THRES=3, DEQ__STOP_MODE="abs"), images(8, 8).float()
    seen = []

    def spy(f, z, threshold, stop_mode):
        seen.append((threshold, stop_mode))
        return broyden(f, z, threshold=threshold, stop_mode=stop_mode)

    model.f_solver, model.b_solver = spy, spy
    for options in ({}, {"f_thres": 6, "b_thres": 2}):
        loss = model(image, **options)[0].sum()
        with pytest.warns(match="adjoint"):  # so few updates are too few
            loss.backward()
    assert seen == [(4, "abs"), (3, "abs"), (6, "abs"), (2, "abs")]


def test_solvers():
    model = plain(DEQ__F_SOLVER="anderson", DEQ__B_SOLVER="fixed_point_iteration")
    assert (model.f_solver, model.b_solver) == (anderson, fixed_point_iteration)
    model.f_solver = "broyden"
    assert (model.f_solver, model.b_solver) == (broyden, fixed_point_iteration)
    for attribute in ("f_solver", "b_solver"):
        with pytest.raises(InputError, match=r"'newton'.*anderson, .*broyden"):
            setattr(model, attribute, "newton")
    assert model.f_solver is broyden


def test_writer():
    """A SummaryWriter is given the residuals and nfe of both passes."""
    rows = []

    class Writer:
        def add_scalar(self, name, value, step):
            rows.append((name, step))

    model, image = plain(), images(8, 8, dtype=FLOAT)
    model(image, 3, writer=Writer())
    assert rows == []
    model(image, 12, writer=Writer())[0].sum().backward()
    passes = ("forward", "backward")
    names = [
        f"{which}/{name}" for which in passes for name in "abs_residual rel_residual nfe".split()
    ]
    assert rows == [(name, 12) for name in names]


@pytest.mark.filterwarnings("ignore:the adjoint")  # the solves are short
@by_kind
@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT, torch.float64])
def test_dtypes(kind, phase, dtype):
    """The output follows the input's dtype."""
    model = plain(kind, 3, WNORM=True, DROPOUT=0.2).to(dtype)
    output, jac_loss, _ = model(images(9, 8, dtype=dtype), phase, f_thres=6, b_thres=12)
    assert (output.dtype, jac_loss.dtype) == (dtype, dtype)
    (output.sum() + jac_loss.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:the adjoint")
@by_kind
@pytest.mark.parametrize("phase", [STACKED, EQUILIBRIUM])
def test_autocast(kind, phase):
    """bfloat16 in f, float32 parameters."""
    model = plain(kind, 3, WNORM=True, DROPOUT=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, jac_loss, _ = model(images(9, 8, dtype=FLOAT), phase, f_thres=6, b_thres=12)
    (output.float().sum() + jac_loss.sum()).backward()
    assert all(p.grad.dtype == FLOAT and p.grad.isfinite().all() for p in model.parameters())


# --- Independence -----------------------------------------------------------------------------

OTHERS = {
    "BLOCK_GN_AFFINE": False,
    "FUSE_GN_AFFINE": False,
    "POST_GN_AFFINE": False,
    "NUM_GROUPS": 4,
    "NUM_CHANNELS": [8, 8],
    "EXPANSION_FACTOR": 3,
    "WNORM": True,
    "DROPOUT": 0.4,
    "DOWNSAMPLE_TIMES": 2,
}


@by_kind
def test_models_in_one_process_do_not_influence_each_other(kind):
    """Built, trained and dropped in between: not a number of the first one changes."""

    def run(model):
        torch.manual_seed(4)
        output, jac_loss, _ = model(images(8, 8), STACKED)
        (output.sum() + jac_loss.sum()).backward()
        return output, [p.grad.clone() for p in model.parameters()], repr(model)

    alone = run(build(kind))
    model = build(kind)
    other_kind = {"cls": "seg", "seg": "cls"}[kind]
    for other in (build(kind, **OTHERS), build(other_kind), build(other_kind, 4)):
        run(other)
    output, grads, text = run(model)
    assert torch.equal(output, alone[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, alone[1], strict=True))
    assert text == alone[2]
    assert str(build(kind)) == text
    momenta = {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {{"cls": 0.1, "seg": 0.01}[kind]}


@by_kind
def test_initial_weights_depend_on_the_seed_alone(kind):
    def draw():
        torch.manual_seed(8)
        return plain(kind, WNORM=True).state_dict()

    first = draw()
    plain(kind, 3, **{**OTHERS, "NUM_CHANNELS": [8, 8, 8]})
    config.clone()
    for key, value in draw().items():
        assert torch.equal(value, first[key]), key


@by_kind
def test_configuration_is_not_changed(kind):
    """It may be frozen, too."""
    cfg = tiny_config(3)
    before = cfg.dump()
    cfg.freeze()
    model = NETS[kind](cfg)
    model(images(8, 8, dtype=FLOAT))
    assert cfg.dump() == before
    assert cfg.is_frozen()
    model.channels[0] = 99  # no alias of the settings
    assert cfg.dump() == before


@by_kind
def test_initialisation(kind):
    """Convolutions N(0, 0.01^2) with their biases, but for weight-normalised ones; BN 1 and 0."""
    torch.manual_seed(0)
    widths = {"NUM_CHANNELS": [24, 24], "HEAD_CHANNELS": [8, 8], "NUM_GROUPS": 8}
    model = plain(kind, WNORM=True, FINAL_CHANSIZE=40, **widths)
    bound = 1 / (24 * 9) ** 0.5
    own = model.fullstage.branches[0].blocks[0].conv1.weight_v
    assert bound * 0.95 < own.abs().max() <= bound  # PyTorch's default: uniform
    for name, p in model.named_parameters():
        if p.dim() == 4 and not name.endswith(("weight_v", "weight_g")) and p.numel() > 100:
            assert 0.008 < p.std() < 0.012, name
            assert p.abs().max() < 0.06, name
        if (
            ".gn" in name
            or "gnorm" in name
            or isinstance(_owner(model, name), torch.nn.BatchNorm2d)
        ):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
    if kind == "cls":
        assert 0.01 < model.downsamp_modules[0][0].bias.abs().max() < 0.05
        assert model.classifier.weight.abs().max() <= 1 / 40**0.5
        assert model.classifier.weight.std() > 0.05
    else:
        assert 0.01 < model.last_layer[0].bias.abs().max() < 0.05


def _owner(model, name):
    return model.get_submodule(name.rpartition(".")[0])


def test_initialisation_can_be_left_to_pytorch():
    torch.manual_seed(0)
    model = plain(INIT_WEIGHTS=False)
    assert model.fullstage.branches[0].blocks[0].conv1.weight.std() > 0.08


@pytest.mark.parametrize("build_net", [*NETS.values(), get_cls_net, get_seg_net])
def test_constructor_reads_no_file_and_draws_torch_alone(build_net, monkeypatch):
    """Not even MODEL.PRETRAINED, which get_seg_net and the command load."""
    cfg = tiny_config(4)
    cfg.MODEL.PRETRAINED = "" if build_net is get_seg_net else "missing.pth"

    def refuse(*args, **kwargs):
        raise AssertionError(f"opened {args}")

    states = random.getstate(), np.random.get_state()[1].tolist()
    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model = build_net(cfg)
    monkeypatch.undo()
    assert model.training
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@by_kind
def test_meta_device(kind):
    """Neither memory nor random numbers; f and the heads run there too."""
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = plain(kind, 4, WNORM=True, DOWNSAMPLE_TIMES=2)
        assert all(t.is_meta for t in model.state_dict().values())
        output = model(torch.zeros(2, 3, 33, 20), STACKED, compute_jac_loss=False)[0]
    assert output.is_meta
    assert output.shape == ((2, 5) if kind == "cls" else (2, 4, 9, 5))
    assert torch.equal(state, torch.get_rng_state())


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (2, 1, 8, 8), (2, 4, 8, 8), (2, 8, 8, 3), (8,)], ids=str
)
@by_kind
def test_images_of_another_shape(kind, shape):
    with pytest.raises(InputError, match=r"must be \(B, 3, H, W\)"):
        plain(kind)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@by_kind
def test_images_of_integers(kind, dtype):
    """As they come from a file, not normalised."""
    with pytest.raises(InputError, match=f"images are {dtype}, but must be floats, normalised"):
        plain(kind)(torch.zeros((2, 3, 8, 8), dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (2, 3, 8, 0), (0, 3, 8, 8)], ids=str)
def test_no_pixels_or_no_images(shape):
    with pytest.raises(InputError):
        plain().eval()(torch.zeros(shape))


REFUSED = [
    ({"NUM_BRANCHES": 0}, "NUM_BRANCHES is 0"),
    ({"NUM_BRANCHES": "2"}, "NUM_BRANCHES is '2'"),
    ({"NUM_BRANCHES": 3}, r"NUM_CHANNELS is \[4, 6\], but must list 3"),
    ({"NUM_BLOCKS": [1]}, r"NUM_BLOCKS is \[1\], but must list 2"),
    ({"NUM_BLOCKS": 2}, "NUM_BLOCKS is 2, but must list 2"),
    ({"BIG_KERNELS": [0, 0, 0]}, "BIG_KERNELS .* must list 2"),
    ({"NUM_GROUPS": 3}, "3 groups.*NUM_GROUPS"),
    ({"NUM_GROUPS": 0}, "NUM_GROUPS is 0"),
    ({"NUM_CHANNELS": [4, 5]}, "5 channels .* 2 groups"),
    ({"EXPANSION_FACTOR": 1.3}, "5 channels .* 2 groups"),
    ({"DROPOUT": 1.0}, "dropout is 1.0"),
    ({"DROPOUT": -0.1}, "dropout is -0.1"),
    ({"NUM_LAYERS": 0}, "NUM_LAYERS is 0"),
    ({"DOWNSAMPLE_TIMES": -1}, "DOWNSAMPLE_TIMES is -1"),
    ({"DEQ__F_SOLVER": "newton"}, "'newton'.*anderson"),
    ({"DEQ__B_SOLVER": "newton"}, "'newton'.*anderson"),
    ({"DEQ__STOP_MODE": "both"}, "stop_mode is 'both'"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[str(c) for c, _ in REFUSED])
@by_kind
def test_constructor_refuses(kind, changes, named):
    with pytest.raises(InputError, match=named) as caught:
        plain(kind, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kernel", [0, 2, 5, "3", None])
def test_constructor_refuses_other_final_kernels(kernel):
    with pytest.raises(InputError, match="FINAL_CONV_KERNEL"):
        plain("seg", FINAL_CONV_KERNEL=kernel)


@pytest.mark.parametrize("missing", ["NUM_BRANCHES", "NUM_CHANNELS", "NUM_BLOCKS", "BIG_KERNELS"])
@by_kind
def test_missing_settings_of_the_stage(kind, missing):
    cfg = tiny_config()
    del cfg.MODEL.EXTRA.FULL_STAGE[missing]
    with pytest.raises(InputError, match=f"FULL_STAGE lacks {missing}"):
        NETS[kind](cfg)


def test_missing_settings_of_the_classification_head():
    for missing in ("HEAD_CHANNELS", "FINAL_CHANSIZE"):
        cfg = tiny_config()
        del cfg.MODEL.EXTRA.FULL_STAGE[missing]
        NETS["seg"](cfg)  # which has no use for them
        with pytest.raises(InputError, match=f"FULL_STAGE lacks {missing}"):
            NETS["cls"](cfg)


def test_defaults_alone_are_no_model():
    with pytest.raises(InputError, match=r"no MODEL\.EXTRA\.FULL_STAGE.*experiments"):
        get_cls_net(config.clone())
    cfg = tiny_config()
    for key, value in (("BLOCK", "BOTTLENECK"), ("FUSE_METHOD", "CAT"), ("NUM_MODULES", 2)):
        other = cfg.clone()
        other.MODEL.EXTRA.FULL_STAGE[key] = value
        with pytest.raises(InputError, match=f"{key} is"):
            get_cls_net(other)


NOT_CHECKED = [
    {"NUM_BLOCKS": [0, 1]},  # builds a model that ignores its image
    {"NUM_BLOCKS": [1, -1]},
    {"NUM_BLOCKS": [1.5, 1]},
    {"NUM_CHANNELS": [4, 0]},
    {"NUM_CHANNELS": [4, -4]},
    {"NUM_CHANNELS": [4, "a"]},
    {"NUM_CHANNELS": [4, 4.0]},
    {"BIG_KERNELS": [3, 0]},
    {"BIG_KERNELS": [-1, 0]},
    {"BIG_KERNELS": ["a", 0]},
    {"HEAD_CHANNELS": [0, 1]},
    {"HEAD_CHANNELS": ["a", 1]},
    {"FINAL_CHANSIZE": 0},
    {"FINAL_CHANSIZE": 2.5},
    {"EXPANSION_FACTOR": 0},
    {"EXPANSION_FACTOR": -1},
    {"NUM_CLASSES": 0},
    {"NUM_CLASSES": -1},
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("changes", NOT_CHECKED, ids=str)
def test_constructor_refuses_values_of_the_stage(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        plain("cls", **changes)


def test_one_group_is_refused_for_what_it_is():
    """PostFusion has NUM_GROUPS // 2 = 0 groups."""
    with pytest.raises(InputError, match=r"NUM_GROUPS is 1, but must be at least 2"):
        plain(NUM_GROUPS=1)
    plain(branches=1, NUM_GROUPS=1)


def test_stage_that_is_no_section():
    cfg = tiny_config()
    cfg.MODEL.EXTRA.FULL_STAGE = 5
    with pytest.raises(InputError, match="FULL_STAGE"):
        get_cls_net(cfg)
