"""The published image settings have the published weights' names and shapes, and load them.

``tests/data/mdeq_contract.json`` holds, per setting, the state dict in order (name, shape, dtype),
the number of trainable parameters and where they lie; ``mdeq_experiments.json`` the settings
themselves and ``mdeq_defaults.json`` the defaults, both by full names.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import mdeq_vision
from lib.errors import InputError
from lib.runs.checkpoint import load_state, load_weights, save_atomic
from mdeq_vision.config import config, flat, merge_file
from parameters import slow_but
from small_vision import NETS, build, fill, images, tiny_config

DATA = Path(__file__).parents[1] / "data"
CONTRACT, DEFAULTS, EXPERIMENTS = (
    json.loads((DATA / f"mdeq_{name}.json").read_text("utf-8"))
    for name in ("contract", "defaults", "experiments")
)
FOLDER = Path(mdeq_vision.__file__).parents[1] / "experiments"
by_setting = pytest.mark.parametrize("setting", CONTRACT)


def config_of(setting: str):
    cfg = config.clone()
    merge_file(cfg, FOLDER / setting)
    return cfg


@cache  # nothing is changed by loading: there are no values
def on_meta(setting: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(mdeq_vision, CONTRACT[setting]["model"])(config_of(setting))


def published(setting: str, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        prefix + key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in CONTRACT[setting]["state_dict"]
    }


# --- Names, shapes, counts --------------------------------------------------------------------


@by_setting
def test_keys_shapes_and_dtypes_in_order(setting):
    state = on_meta(setting).state_dict()
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert found == CONTRACT[setting]["state_dict"]


@by_setting
def test_numbers_of_parameters(setting):
    model, facts = on_meta(setting), CONTRACT[setting]
    counts = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
    }
    assert counts == facts["parameters_of"]
    assert sum(counts.values()) == facts["parameters"]
    assert all(p.requires_grad for p in model.parameters())


@by_setting
def test_momentum_of_every_batch_norm(setting):
    norms = [m for m in on_meta(setting).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {CONTRACT[setting]["bn_momentum"]}
    stems = [key for key, _, _ in CONTRACT[setting]["state_dict"] if key.endswith("running_mean")]
    assert len(norms) == len(stems)  # none of them is without statistics


# --- Settings ---------------------------------------------------------------------------------

# The published roots were of one machine.
OWN_VALUES = {"DATASET.ROOT"}


@by_setting
def test_merged_settings_are_the_published_ones(setting):
    """Everything that the file does not say is a default."""
    merged = flat(config_of(setting))
    expected = {**flat(config), **EXPERIMENTS[setting]}
    expected["GPUS"] = [int(n) for n in EXPERIMENTS[setting]["GPUS"].strip("(),").split(",")]
    for key in OWN_VALUES:
        expected[key] = merged[key]
    assert merged == expected
    assert not merged["DATASET.ROOT"].startswith(("/", ".."))


# Keys that the published code does not have.
NEW = """
    AMP COMPILE DATASET.CLASSES DEQ.GRAD DEQ.F_START GRAPH KEEP_CHECKPOINTS MAX_TIME SAVE_FREQ SEED
    TF32 TRAIN.BATCH_CHUNK TRAIN.BATCH_SIZE TRAIN.MAX_SKIPPED
""".split()


def test_defaults_are_the_published_ones():
    """Without those of poses, and without a data set of poses."""
    own = flat(config)
    assert {key: own[key] for key in DEFAULTS} == DEFAULTS
    assert all(type(own[key]) is type(value) for key, value in DEFAULTS.items())
    assert set(own) == {*DEFAULTS, *NEW}
    assert config.MODEL.EXTRA == {}


def test_sections_that_are_open_to_new_keys():
    """MODEL.EXTRA alone."""
    open_sections = [
        name for name, section in config.items() if getattr(section, "is_new_allowed", bool)()
    ]
    assert open_sections == []
    assert not config.is_new_allowed()
    assert config.MODEL.EXTRA.is_new_allowed()


# --- Loading ----------------------------------------------------------------------------------

# As seen on published files: of DataParallel, of the segmentation trainer's wrapper, of both.
PREFIXES = ["", "module.", "model.", "module.model."]


@by_setting
@pytest.mark.parametrize("prefix", PREFIXES)
def test_published_names_load(setting, prefix):
    """By key and shape: the values are on the meta device too."""
    state = published(setting, prefix)
    copies = {
        key.replace("fullstage.", "fullstage_copy."): value
        for key, value in state.items()
        if "fullstage." in key
    }
    assert copies
    load_state(on_meta(setting), {**state, **copies}, "published weights")


@by_setting
def test_wrong_names_are_listed(setting):
    state = published(setting)
    conv = next(key for key in state if "post_fuse_layers" in key and key.endswith("weight_v"))
    norm = "downsample.1.running_mean"
    del state["downsample.0.weight"], state["downsample.4.num_batches_tracked"]
    state["fullstage_copies.0"] = state[conv]
    shape = tuple(state[conv].shape)
    state[conv], state[norm] = state[conv][1:], state[norm][1:]
    with pytest.raises(InputError) as caught:
        load_state(on_meta(setting), state, "weights.pth")
    message = str(caught.value)
    assert "weights.pth" in message
    assert "missing downsample.0.weight" in message
    assert "missing downsample.4.num_batches_tracked" in message
    assert "unexpected fullstage_copies.0" in message
    assert f"{conv} has shape {(shape[0] - 1, *shape[1:])} instead of {shape}" in message
    assert f"{norm} has shape" in message
    assert "\n" not in message


# --- Real weights, at a size that fits a test -------------------------------------------------


@pytest.fixture(params=["cls", "seg"])
def kind(request):
    return request.param


@pytest.fixture
def trained(kind):
    return build(kind, 3, WNORM=True).float().eval()


def as_published(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """With a second copy of f, whose values differ."""
    state = {prefix + key: value.clone() for key, value in model.state_dict().items()}
    copies = {
        key.replace("fullstage.", "fullstage_copy."): value + 1
        for key, value in state.items()
        if key.startswith(f"{prefix}fullstage.")
    }
    return {**state, **copies}


@pytest.mark.parametrize(
    ("prefix", "form"),
    slow_but(
        [*zip(PREFIXES, ["bare", "state_dict"] * 2, strict=True)],
        product(PREFIXES, ["bare", "state_dict"]),
    ),
)
def test_loaded_model_computes_the_same(kind, trained, tmp_path, prefix, form):
    state = as_published(trained, prefix)
    content = state if form == "bare" else {"state_dict": state, "epoch": 3, "perf": 0.9}
    path = tmp_path / "weights.pth"
    save_atomic(content, path)
    model = NETS[kind](tiny_config(3, WNORM=True)).eval()
    load_weights(model, path)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    image = images(8, 8, dtype=torch.float32)
    model.f_solver = trained.f_solver = "broyden"
    assert torch.equal(model(image)[0], trained(image)[0])


def test_plain_load_state_dict_ignores_the_second_copy(kind, trained):
    """In a notebook: PyTorch's own call, with what only published files have."""
    model = NETS[kind](tiny_config(3, WNORM=True))
    missing, unexpected = model.load_state_dict(as_published(trained))
    assert (missing, unexpected) == ([], [])
    assert torch.equal(model.downsample[0].weight, trained.downsample[0].weight)
    with pytest.raises(RuntimeError, match="fullstagecopy"):
        model.load_state_dict({**as_published(trained), "fullstagecopy.x": torch.zeros(1)})
    state = as_published(trained)
    del state["downsample.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*downsample\.0\.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["downsample.0.weight"]
    twin = dict(state)
    model.load_state_dict(state, strict=False)
    assert list(state) == list(twin)  # the caller's dict is left alone


def test_wrong_files_change_nothing(kind, trained, tmp_path):
    """Refused as a whole, before the first number is written."""
    model = NETS[kind](tiny_config(3, WNORM=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = as_published(trained)
    bad_states = {
        "shape": {**state, "downsample.1.weight": torch.zeros(5)},
        "NaN": {**state, "stage0.0.weight": state["stage0.0.weight"] * float("nan")},
        "missing": {k: v for k, v in state.items() if not k.startswith("stage0")},
        "other prefix": {f"net.{k}": v for k, v in state.items()},
        "prefix of some": {f"module.{k}" if "stage0" in k else k: v for k, v in state.items()},
        "empty": {},
    }
    for name, bad in bad_states.items():
        save_atomic(bad, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=r"weights\.pth"):
            load_weights(model, tmp_path / "weights.pth")
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value), name


def test_weights_of_data_parallel(kind, trained, tmp_path):
    save_atomic(nn.DataParallel(trained).state_dict(), tmp_path / "weights.pth")
    model = NETS[kind](tiny_config(3, WNORM=True))
    fill(model, seed=9)
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.downsample[0].weight, trained.downsample[0].weight)
