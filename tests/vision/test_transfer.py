"""From a classification checkpoint to a segmentation model: what is and is not taken over."""

import pickle

import pytest
import torch
from torch import nn

from lib.errors import InputError
from lib.runs.checkpoint import load, save_atomic
from mdeq_vision import MDEQClsNet, MDEQSegNet, get_seg_net
from mdeq_vision.transfer import BACKBONE, extract_pretrained, load_pretrained
from small_vision import build, tiny_config

SETTINGS = {"WNORM": True, "DROPOUT": 0.1, "DOWNSAMPLE_TIMES": 2}


@pytest.fixture
def source():
    """A trained classification model, float32."""
    return build("cls", 3, seed=5, **SETTINGS).float()


def checkpoint_of(model: nn.Module, style: str) -> dict:
    """Files as they occur."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if style == "bare":
        return state
    if style == "ours":
        return {"state_dict": state, "optimizer": {"state": {}, "param_groups": []}, "step": 7}
    copies = {
        key.replace("fullstage.", "fullstage_copy."): value + 1
        for key, value in state.items()
        if key.startswith("fullstage.")
    }
    published = {f"module.{key}": value for key, value in {**state, **copies}.items()}
    return {"state_dict": published, "epoch": 3, "perf": torch.tensor(0.8)}


def seg_net(**changes) -> MDEQSegNet:
    torch.manual_seed(11)
    return MDEQSegNet(tiny_config(3, **{**SETTINGS, **changes}))


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="source.pth"):
        save_atomic(content, tmp_path / name)
        return tmp_path / name

    return to_file


def backbone_of(model: nn.Module) -> dict:
    return {key: v for key, v in model.state_dict().items() if key.startswith(BACKBONE)}


STYLES = ["bare", "ours", "published"]


@pytest.mark.parametrize("style", STYLES)
def test_extractor(source, write, tmp_path, style):
    """Stem, stage0 and f, under plain names; neither head nor second copy."""
    output = tmp_path / "new" / "folder" / "pretrained.pth"
    names = extract_pretrained(write(checkpoint_of(source, style)), output)
    found, expected = load(output), backbone_of(source)
    assert list(found) == names == list(expected)
    assert {name.split(".")[0] for name in names} == {"downsample", "stage0", "fullstage"}
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_the_checkpoint_is_not_overwritten(source, write, tmp_path):
    path = write(checkpoint_of(source, "ours"))
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    for output in (path, tmp_path / "link.pth"):
        with pytest.raises(InputError, match="is the file that is read"):
            extract_pretrained(path, output)
    assert path.read_bytes() == before


@pytest.mark.parametrize("extracted", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_segmentation_starts_from_it(source, write, tmp_path, style, extracted):
    """With MODEL.PRETRAINED; the checkpoint itself does as well."""
    path = write(checkpoint_of(source, style))
    if extracted:
        extract_pretrained(path, tmp_path / "pretrained.pth")
        path = tmp_path / "pretrained.pth"
    cfg, lines = tiny_config(3, **SETTINGS), []
    cfg.MODEL.PRETRAINED = str(path)
    torch.manual_seed(11)
    model, untouched = get_seg_net(cfg, lines.append), seg_net()
    own = model.state_dict()
    for key, value in backbone_of(source).items():
        assert torch.equal(own[key], value), key
    heads = [key for key in own if key.startswith("last_layer.")]
    assert len(own) == len(heads) + len(backbone_of(source))
    for key in heads:
        assert torch.equal(own[key], untouched.state_dict()[key]), key

    text = "\n".join(lines)
    assert f"{path}: {len(own) - len(heads)} of the model's {len(own)} tensors" in text
    taken, left, kept = lines[1:]
    assert taken.split(": ")[1].split(", ") == list(backbone_of(source))
    assert kept.split(": ")[1].split(", ") == heads
    left = left.split(": ")[1].split(", ")
    if extracted:
        assert left == ["none"]
    else:
        assert {"classifier.weight", "incre_modules.0.0.conv1.weight"} <= set(left)
        assert any(name.startswith("fullstage_copy.") for name in left) == (style == "published")


@pytest.mark.parametrize("classes", [5, 7])
@pytest.mark.parametrize("style", STYLES)
def test_classification_takes_over_all_but_the_last_layer(source, write, style, classes):
    """Also with as many classes: they may be others. The log says what stays."""
    lines = []
    model = MDEQClsNet(tiny_config(3, **SETTINGS, NUM_CLASSES=classes))
    before = model.classifier.weight.clone()
    assert (model.classifier.weight.shape == source.classifier.weight.shape) == (classes == 5)
    load_pretrained(model, write(checkpoint_of(source, style)), lines.append)
    last = ["classifier.weight", "classifier.bias"]
    own = model.state_dict()
    for key, value in source.state_dict().items():
        assert key in last or torch.equal(own[key], value), key
    assert torch.equal(model.classifier.weight, before)
    assert lines[0].endswith(f"{len(own) - 2} of the model's {len(own)} tensors taken over")
    left, kept = (line.split(": ")[1].split(", ") for line in lines[2:4])
    assert [key for key in left if not key.startswith("fullstage_copy.")] == kept == last


def test_classification_starts_from_a_backbone_alone(source, write, tmp_path):
    extract_pretrained(write(checkpoint_of(source, "ours")), tmp_path / "backbone.pth")
    model = MDEQClsNet(tiny_config(3, **SETTINGS))
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, tmp_path / "backbone.pth")
    for key, value in model.state_dict().items():
        expected = source.state_dict() if key.startswith(BACKBONE) else untouched
        assert torch.equal(value, expected[key]), key


def test_heads_are_untouched_even_where_names_and_shapes_agree(source, write):
    """A segmentation checkpoint as MODEL.PRETRAINED: f is taken over, its head is not."""
    other = build("seg", 3, seed=6, **SETTINGS).float()
    model, before = seg_net(), seg_net().state_dict()
    load_pretrained(model, write(other.state_dict()))
    for key, value in model.state_dict().items():
        expected = before if key.startswith("last_layer.") else other.state_dict()
        assert torch.equal(value, expected[key]), key


def test_shapes_that_differ_are_listed(source, write):
    """Another stem and other norms: what fits is taken over, and the log says what was not."""
    lines, state = [], dict(source.state_dict())
    state["downsample.0.weight"] = torch.zeros(4, 1, 3, 3)
    del state["stage0.0.weight"]
    model, before = seg_net(), seg_net().state_dict()
    load_pretrained(model, write(state), lines.append)
    taken, left, kept = (line.split(": ")[1].split(", ") for line in lines[1:4])
    assert lines[4].startswith("warning: 2 tensors of the backbone keep their initial values")
    for key in ("downsample.0.weight", "stage0.0.weight"):
        assert key not in taken
        assert key in kept
        assert torch.equal(model.state_dict()[key], before[key])
    assert "downsample.0.weight" in left
    assert "fullstage.branches.0.blocks.0.conv1.weight_v" in taken


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"NUM_CHANNELS": [8, 8, 8]}, r"needs, for one, .*conv1\.weight_g \(16, 1, 1, 1\), and"),
        ({"WNORM": False, "NUM_GROUPS": 4, "NUM_CHANNELS": [8, 8, 8]}, r"conv1\.weight \(16, 8"),
    ],
)
def test_file_that_matches_nothing(source, write, changes, named):
    path = write(checkpoint_of(source, "published"))
    model, before = seg_net(**changes), seg_net(**changes).state_dict()
    with pytest.raises(InputError, match=rf"no weight of f in .*source\.pth.*{named}") as caught:
        load_pretrained(model, path)
    assert "\n" not in str(caught.value)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    "content", [{}, {"conv.weight": torch.zeros(3)}, {"state_dict": {}}], ids=["", "other", "empty"]
)
def test_files_of_other_models(write, tmp_path, content):
    path = write(content)
    with pytest.raises(InputError, match=r"no weight of f in .*source\.pth"):
        load_pretrained(seg_net(), path)
    with pytest.raises(InputError, match=r"source\.pth holds no MDEQ model"):
        extract_pretrained(path, tmp_path / "pretrained.pth")
    assert not (tmp_path / "pretrained.pth").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source, write, tmp_path, bad):
    name = "fullstage.branches.1.blocks.0.conv2.weight_v"
    state = source.state_dict()
    state[name] = state[name] * bad
    path, model, before = write(state), seg_net(), seg_net().state_dict()
    with pytest.raises(InputError, match=rf"not finite: {name}"):
        load_pretrained(model, path)
    with pytest.raises(InputError, match=rf"not finite: {name}"):
        extract_pretrained(path, tmp_path / "pretrained.pth")
    assert not (tmp_path / "pretrained.pth").exists()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_not_finite_head_does_not_matter(source, write, tmp_path):
    state = source.state_dict()
    state["classifier.weight"] = state["classifier.weight"] * float("nan")
    load_pretrained(seg_net(), write(state))
    assert extract_pretrained(write(state), tmp_path / "pretrained.pth")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_files_with_code_are_refused_and_not_run(source, tmp_path, saved_by):
    path, proof = tmp_path / "trap.pth", tmp_path / "was-run"
    content = {"state_dict": source.state_dict(), "trap": Trap(proof)}
    if saved_by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"trap": Trap(proof)}))
    for attempt in (
        lambda: load_pretrained(seg_net(), path),
        lambda: extract_pretrained(path, tmp_path / "pretrained.pth"),
    ):
        with pytest.raises(InputError, match=r"trap\.pth"):
            attempt()
    assert not proof.exists()
    assert not (tmp_path / "pretrained.pth").exists()


def test_missing_and_damaged_files(source, write, tmp_path):
    cfg = tiny_config(3, **SETTINGS)
    cfg.MODEL.PRETRAINED = str(tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"none\.pth"):
        get_seg_net(cfg)
    with pytest.raises(InputError, match=r"none\.pth"):
        extract_pretrained(tmp_path / "none.pth", tmp_path / "pretrained.pth")
    path = write(source.state_dict())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"source\.pth"):
        load_pretrained(seg_net(), path)
    save_atomic([1, 2], path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_pretrained(seg_net(), path)
