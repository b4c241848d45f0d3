"""From classification to segmentation by the commands: train, extract, start from it."""

import re

import pytest
import torch

from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, read_metrics
from mdeq_vision.datasets import digit_scenes
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer
from small_runs import DIGITS, SCENES, TINY, TINY_DIGITS, run_tool

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
STAGE = "MODEL.EXTRA.FULL_STAGE"
# What both kinds of model share.
MODEL = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.BIG_KERNELS [0,0] {STAGE}.HEAD_CHANNELS [4,4] MODEL.DOWNSAMPLE_TIMES 1
    MODEL.POST_GN_AFFINE True WORKERS 0 TRAIN.END_EPOCH 1
""".split()
SEG = [*TINY, "PERCENT", "0.3", "TRAIN.IMAGE_SIZE", "[32,32]", *MODEL]
BACKBONE = ("downsample.", "stage0.", "fullstage.")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a trained classifier."""
    folder = tmp_path_factory.mktemp("cls")
    argv = ["--cfg", DIGITS, "--modelDir", folder, *TINY_DIGITS, "MODEL.IMAGE_SIZE", "[16,16]"]
    assert run_tool("cls_train", *argv, *MODEL) == 0
    return folder / "digits" / DIGITS.stem


@pytest.fixture
def pretrained(classifier, tmp_path, capsys):
    """The extracted file."""
    path = tmp_path / "pretrained_models" / "mdeq.pth"
    assert run_tool("extract", classifier / WEIGHTS, path) == 0
    return path


@pytest.fixture
def started(monkeypatch):
    """The weights that training starts with; no step is taken."""
    states = []

    def train(self, run):
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(SegmentationTrainer, "train", train)
    monkeypatch.setattr(ClassificationTrainer, "train", train)
    return states


def seg_train(folder, *more):
    return run_tool("seg_train", "--cfg", SCENES, "--modelDir", folder, *SEG, *more)


def run_of(folder):
    return folder / "digit_scenes" / SCENES.stem


def names_after(title, log):
    (line,) = re.findall(rf"^  {re.escape(title)}: (.*)$", log, re.MULTILINE)
    return [] if line == "none" else line.split(", ")


def test_extracted_is_the_backbone(classifier, pretrained, capsys):
    weights, found = load(classifier / WEIGHTS), load(pretrained)
    assert list(found) == [key for key in weights if key.startswith(BACKBONE)]
    assert all(torch.equal(found[key], weights[key]) for key in found)
    assert len(found) < len(weights)


def test_extracted_from_the_checkpoint(classifier, tmp_path, capsys):
    path = tmp_path / "last.pth"
    assert run_tool("extract", classifier / CHECKPOINT, path) == 0
    assert f"{len(load(path))} tensors of {classifier / CHECKPOINT}" in capsys.readouterr().out
    last = load(classifier / CHECKPOINT)["state_dict"]
    assert all(torch.equal(value, last[key]) for key, value in load(path).items())


def test_segmentation_starts_from_it(pretrained, tmp_path, started):
    assert seg_train(tmp_path, "MODEL.PRETRAINED", pretrained) == 0
    (state,), file = started, load(pretrained)
    assert [key for key in file if not torch.equal(state[key], file[key])] == []
    log = (run_of(tmp_path) / LOG).read_text()
    rest = [key for key in state if key not in file]
    assert rest
    assert all(key.startswith("last_layer.") for key in rest)
    assert f"{pretrained}: {len(file)} of the model's {len(state)} tensors taken over" in log
    assert names_after("taken over", log) == list(file)
    assert names_after("not taken over (left in the file)", log) == []
    assert names_after("not taken over (kept as initialised)", log) == rest


def test_training_goes_through(pretrained, tmp_path):
    """And its first loss is another one than without."""
    assert seg_train(tmp_path / "with", "MODEL.PRETRAINED", pretrained) == 0
    assert seg_train(tmp_path / "without") == 0
    runs = [read_metrics(run_of(tmp_path / name)) for name in ("with", "without")]
    assert runs[0][0]["loss"] != runs[1][0]["loss"]
    assert "taken over" not in (run_of(tmp_path / "without") / LOG).read_text()


def test_a_whole_checkpoint_will_do(classifier, tmp_path, started):
    """Its head is left in the file, and the log says so."""
    assert seg_train(tmp_path, "MODEL.PRETRAINED", classifier / CHECKPOINT) == 0
    file = load(classifier / CHECKPOINT)["state_dict"]
    (state,) = started
    shared = [key for key in file if key.startswith(BACKBONE)]
    assert all(torch.equal(state[key], file[key]) for key in shared)
    left = names_after("not taken over (left in the file)", (run_of(tmp_path) / LOG).read_text())
    assert left == [key for key in file if key not in shared]
    assert "classifier.weight" in left


def test_published_names(pretrained, tmp_path, started):
    """Under 'state_dict', with wrappers' prefixes and a second copy of f."""
    file = load(pretrained)
    copies = {k.replace("fullstage.", "fullstage_copy."): v for k, v in file.items()}
    published = {f"module.{k}": v for k, v in {**copies, **file}.items()}
    torch.save({"state_dict": published}, tmp_path / "published.pth")
    assert seg_train(tmp_path, "MODEL.PRETRAINED", tmp_path / "published.pth") == 0
    (state,) = started
    assert all(torch.equal(state[key], value) for key, value in file.items())
    log = (run_of(tmp_path) / LOG).read_text()
    left = names_after("not taken over (left in the file)", log)
    assert left
    assert all(key.startswith("fullstage_copy.") for key in left)


def test_a_model_with_another_branch_takes_what_fits(pretrained, tmp_path, started):
    more = f"""
        {STAGE}.NUM_BRANCHES 3 {STAGE}.NUM_CHANNELS [8,8,16] {STAGE}.NUM_BLOCKS [1,1,1]
        {STAGE}.BIG_KERNELS [0,0,0]
    """.split()
    assert seg_train(tmp_path, *more, "MODEL.PRETRAINED", pretrained) == 0
    (state,), file = started, load(pretrained)
    assert all(torch.equal(state[key], value) for key, value in file.items())
    kept = names_after("not taken over (kept as initialised)", (run_of(tmp_path) / LOG).read_text())
    assert "fullstage.branches.2.blocks.0.conv2.weight_v" in kept


def test_classification_may_start_from_it_too(pretrained, tmp_path, started):
    argv = ["--cfg", DIGITS, "--modelDir", tmp_path, *TINY_DIGITS, *MODEL]
    assert run_tool("cls_train", *argv, "MODEL.PRETRAINED", pretrained) == 0
    (state,) = started
    assert all(torch.equal(state[key], value) for key, value in load(pretrained).items())


@pytest.mark.parametrize(
    "more",
    [
        [f"{STAGE}.NUM_CHANNELS", "[12,12]"],
        ["MODEL.WNORM", "False", "MODEL.EXPANSION_FACTOR", "2", f"{STAGE}.NUM_CHANNELS", "[16,16]"],
    ],
)
def test_a_file_that_matches_nothing_is_refused(pretrained, tmp_path, capsys, more):
    capsys.readouterr()
    assert seg_train(tmp_path / "out", *more, "MODEL.PRETRAINED", pretrained) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no weight of f in {pretrained} fits" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert seg_train(tmp_path / "out", "MODEL.PRETRAINED", tmp_path / "no.pth") == 2
    assert str(tmp_path / "no.pth") in capsys.readouterr().err


def test_extracting_over_a_file_replaces_it_whole(classifier, tmp_path):
    path = tmp_path / "mdeq.pth"
    path.write_bytes(b"old")
    assert run_tool("extract", classifier / WEIGHTS, path) == 0
    assert load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mdeq.pth"]
