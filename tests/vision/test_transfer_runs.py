"""From classification to segmentation by the commands: train, extract, start from it."""

import re

import pytest
import torch

from lib.runs.checkpoint import load
from lib.runs.run_folder import LOG, WEIGHTS, read_metrics
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
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})


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

    def train(self, *run):
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


def test_extracting_over_a_file_replaces_it_whole(classifier, tmp_path):
    path = tmp_path / "mdeq.pth"
    path.write_bytes(b"old")
    assert run_tool("extract", classifier / WEIGHTS, path) == 0
    assert load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mdeq.pth"]
