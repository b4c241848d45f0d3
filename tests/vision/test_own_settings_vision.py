"""A run of images is evaluated by its own settings; what differs is named."""

import shutil
from argparse import Namespace

import pytest

from lib.errors import InputError
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS
from mdeq_vision.command import CONFIG, load_config
from mdeq_vision.config import config, update_config
from mdeq_vision.options import experiment_parser
from mdeq_vision.own_settings import evaluation_config
from small_digits import digits, quick  # noqa: F401  (fixtures)
from small_runs import DIGITS, SCENES, run_tool

OWN = (
    *("MODEL.POST_GN_AFFINE", "True", "DEQ.STOP_MODE", "abs", "DEQ.F_THRES", "3"),
    *("TEST.NUM_SAMPLES", "4"),
)


def test_the_settings_are_those_of_the_run(digits, capsys, tmp_path):  # noqa: F811
    """However little the command line says: the figures are those at the end of the run."""
    folder = digits(*OWN)
    lines = (folder / LOG).read_text().splitlines()
    (last,) = (line for line in lines if "test, last weights (step 6)" in line)
    expected = last.split(" | ", 2)[2]
    places = ["--cfg", DIGITS, "--modelDir", tmp_path]

    def evaluate(*argv):
        capsys.readouterr()
        assert run_tool("cls_valid", *argv) == 0
        *lines, figures = capsys.readouterr().out.splitlines()
        return [x for x in lines if x.startswith("note: ")], figures.split(" | ", 1)[1]

    notes, figures = evaluate(*places, "--testModel", folder / CHECKPOINT)
    assert figures == expected
    assert "note: DEQ.STOP_MODE is 'abs', as in the run, and not 'rel'" in notes
    assert not any("TRAIN." in note or "LOSS." in note for note in notes)
    notes, figures = evaluate(*digits.argv(*OWN, "DEQ.F_THRES", "5", "TRAIN.LR", "9"))
    assert notes == ["note: DEQ.F_THRES is 5 in this evaluation, and 3 in the run"]
    # Weights alone are evaluated by the yaml file and the command line.
    shutil.copy(folder / CHECKPOINT, tmp_path / "alone.pt")
    alone = ["--testModel", tmp_path / "alone.pt"]
    assert evaluate(*digits.argv(*OWN), *alone) == ([], expected)


@pytest.fixture
def saved(tmp_path):
    """A folder with the settings that a run saves."""

    def write(*opts, data_dir=None):
        cfg = config.clone()
        update_config(cfg, Namespace(cfg=DIGITS, opts=[*map(str, opts)], dataDir=data_dir))
        (tmp_path / CONFIG).write_text(cfg.dump())
        return tmp_path / CONFIG

    return write


def merged(path, *argv, cfg=DIGITS):
    words = ["--cfg", cfg, "--testModel", path.parent / WEIGHTS, *argv]
    args = experiment_parser("cls_valid.py", "").parse_intermixed_args([*map(str, words)])
    notes = []
    return evaluation_config(args, load_config(args), path, notes.append), notes


def test_every_setting_comes_back(saved):
    path = saved("MODEL.WNORM", "False", "TRAIN.LR", "3", "MODEL.EXTRA.MINE", "[1]")
    cfg, notes = merged(path, "OUTPUT_DIR", "there", "DEBUG.DEBUG", "True")
    expected = config.clone()
    update_config(expected, Namespace(cfg=path))
    expected.defrost()
    expected.OUTPUT_DIR, expected.DEBUG.DEBUG = "there", True
    expected.TEST.MODEL_FILE = str(path.parent / WEIGHTS)
    assert cfg == expected
    assert notes == [
        "note: MODEL.WNORM is False, as in the run, and not True",
        "note: MODEL.EXTRA.MINE is [1], as in the run, and not None",
    ]


def test_what_an_evaluation_may_choose(saved):
    choice = {
        "DEQ.F_THRES": 3, "DEQ.F_SOLVER": "anderson", "TEST.BATCH_SIZE_PER_GPU": 7, "AMP": "bf16",
        "DATASET.ROOT": "elsewhere", "MODEL.IMAGE_SIZE": [8, 8], "SEED": 5,
    }  # fmt: skip
    words = [str(word) for pair in choice.items() for word in pair]
    cfg, notes = merged(saved(), *words)
    assert all(
        f"note: {key} is {value!r} in this" in "\n".join(notes) for key, value in choice.items()
    )
    assert len(notes) == len(choice)
    assert cfg.DEQ.F_SOLVER == "anderson"


def test_what_the_run_decides(saved):
    path = saved("TRAIN.IGNORE_LABEL", 255)
    cfg, notes = merged(
        path, "MODEL.NUM_GROUPS", "2", "TRAIN.WD", "0.5", "TRAIN.IGNORE_LABEL", "-1"
    )
    assert cfg == merged(path)[0]
    assert notes == [
        "note: MODEL.NUM_GROUPS is 4, as in the run, and not 2",
        "note: TRAIN.IGNORE_LABEL is 255, as in the run, and not -1",
    ]
    _, notes = merged(path, cfg=SCENES)
    assert "note: DATASET.DATASET is 'digits', as in the run, and not 'digit_scenes'" in notes


def test_another_data_folder_takes_the_place_of_that_of_the_run(saved):
    path = saved("DATASET.ROOT", "cifar", data_dir="here")
    assert merged(path)[0].DATASET.ROOT == "here/cifar"
    cfg, notes = merged(path, "--dataDir", "there")
    assert (cfg.DATA_DIR, cfg.DATASET.ROOT) == ("there", "there/cifar")
    assert [note.split()[1] for note in notes] == ["DATA_DIR", "DATASET.ROOT"]


def test_settings_that_are_missing(tmp_path, saved):
    cfg, notes = merged(tmp_path / CONFIG)
    assert (cfg.DEQ.F_THRES, notes) == (14, [])  # weights alone
    args = experiment_parser("", "").parse_intermixed_args(["--cfg", str(DIGITS)])
    assert evaluation_config(args, load_config(args), tmp_path / CONFIG, notes.append)
    assert notes == [f"note: {tmp_path / CONFIG} is missing, so the settings are those of {DIGITS}"]


@pytest.mark.parametrize(
    "text", ["", "null", "{", "TRAIN: {LR: -1}", "TRAIN: {LRR: 1}", "TRAIN: 3", "\x00", "TEST: []"]
)
def test_bad_settings_are_refused(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(InputError) as caught:
        merged(tmp_path / CONFIG)
    path = tmp_path / CONFIG
    assert str(caught.value).startswith((f"{path}: ", f"{path} "))
    assert f"{path}: {path}" not in str(caught.value)
    assert "\n" not in str(caught.value)
