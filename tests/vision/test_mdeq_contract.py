"""The published image settings have the published weights' names and shapes, and load them.

``tests/data/mdeq_contract.json`` holds, per setting, the state dict in order (name, shape, dtype),
the number of trainable parameters and where they lie; ``mdeq_experiments.json`` the settings
themselves and ``mdeq_defaults.json`` the defaults, both by full names.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import mdeq_vision
from lib.errors import InputError
from lib.runs.checkpoint import load_state, load_weights, save_atomic
from mdeq_vision.config import config, flat, merge_file
from small_vision import NETS, build, fill, images, tiny_config

DATA = Path(__file__).parents[1] / "data"
CONTRACT, DEFAULTS, EXPERIMENTS = (
    json.loads((DATA / f"mdeq_{name}.json").read_text("utf-8"))
    for name in ("contract", "defaults", "experiments")
)
FOLDER = Path(mdeq_vision.__file__).parents[1] / "experiments"
by_setting = pytest.mark.parametrize("setting", CONTRACT)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


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


def test_eleven_settings():
    assert len(CONTRACT) == 11
    assert list(CONTRACT) == list(EXPERIMENTS)


@by_setting
def test_keys_shapes_and_dtypes_in_order(setting):
    state = on_meta(setting).state_dict()
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert found == CONTRACT[setting]["state_dict"]


@by_setting
def test_parameters_in_order(setting):
    """The order that an optimiser's state indexes."""
    keys = [key for key, _, _ in CONTRACT[setting]["state_dict"] if not key.endswith(BUFFERS)]
    assert [name for name, _ in on_meta(setting).named_parameters()] == keys


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
def test_file_has_the_published_settings(setting):
    """Key by key, and no further key."""
    content = yaml.safe_load((FOLDER / setting).read_text("utf-8"))

    def names(part, prefix=""):
        for key, value in part.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    found = dict(names(content))
    assert list(found) == list(EXPERIMENTS[setting])
    different = {key for key, value in EXPERIMENTS[setting].items() if found[key] != value}
    assert different <= OWN_VALUES


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


# Human-pose leftovers by name, in whatever section.
POSE = """
    NUM_JOINTS TAG_PER_JOINT TARGET_TYPE HEATMAP_SIZE SIGMA TOPK USE_TARGET_WEIGHT
    USE_DIFFERENT_JOINTS_WEIGHT HYBRID_JOINTS_TYPE ROT_FACTOR PROB_HALF_BODY NUM_JOINTS_HALF_BODY
    COLOR_RGB TEST_ONLY POST_PROCESS SHIFT_HEATMAP USE_GT_BBOX IMAGE_THRE NMS_THRE
    SOFT_NMS OKS_THRE IN_VIS_THRE COCO_BBOX_FILE BBOX_THRE SAVE_BATCH_IMAGES_GT
    SAVE_BATCH_IMAGES_PRED SAVE_HEATMAPS_GT SAVE_HEATMAPS_PRED
""".split()
WITHOUT_MEANING = """
    RANK CONV_INJECTION CLASS_BALANCE SELECT_DATA GAMMA1 GAMMA2 ANALYSIS
""".split()
# DATASET.FLIP and SCALE_FACTOR are of poses too; TRAIN's are of segmentation.
DROPPED = [
    key
    for key in DEFAULTS
    if key.rpartition(".")[2] in {*POSE, *WITHOUT_MEANING}
    or key in ("DATASET.FLIP", "DATASET.SCALE_FACTOR")
]
OTHER_DEFAULTS = {"DATASET.DATASET": "imagenet"}  # the default data set was one of poses


def test_defaults_are_the_published_ones():
    own = flat(config)
    kept = [key for key in DEFAULTS if key not in DROPPED and key != "MODEL.EXTRA"]
    assert {key: own[key] for key in kept} == {
        **{key: DEFAULTS[key] for key in kept},
        **OTHER_DEFAULTS,
    }
    assert all(type(own[key]) is type(DEFAULTS[key]) for key in kept)
    new = "AMP COMPILE DEQ.GRAD KEEP_CHECKPOINTS MAX_TIME SAVE_FREQ SEED TF32"
    new += " TRAIN.BATCH_CHUNK TRAIN.BATCH_SIZE TRAIN.MAX_SKIPPED"
    assert sorted(set(own) - set(kept)) == new.split()
    assert config.MODEL.EXTRA == {}


def test_dropped_keys_are_absent_and_were_there():
    assert not set(DROPPED) & set(flat(config))
    assert {key.rpartition(".")[2] for key in DROPPED} >= {*POSE, *WITHOUT_MEANING}
    assert not set(DROPPED) & {key for values in EXPERIMENTS.values() for key in values}


def test_every_key_of_the_experiments_exists():
    used = {key for values in EXPERIMENTS.values() for key in values}
    assert {key for key in used if not key.startswith("MODEL.EXTRA.")} <= set(flat(config))


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


def test_settings_do_not_fit_each_other():
    with pytest.raises(InputError, match=r"missing classifier\.weight.*unexpected last_layer"):
        load_state(
            on_meta("imagenet/cls_mdeq_SMALL.yaml"),
            published("cityscapes/seg_mdeq_SMALL.yaml"),
            "weights.pth",
        )


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


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["bare", "state_dict"])
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
