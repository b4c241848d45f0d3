"""A run is evaluated by its own settings; what differs is named."""

import json
import shutil

import pytest

from deq_sequence.command import main
from deq_sequence.options import parse
from deq_sequence.own_settings import (
    CHOSEN,
    check_vocabulary,
    evaluation_settings,
    read_settings,
)
from deq_sequence.text.corpus import get_lm_corpus
from lib.errors import InputError
from lib.runs.run_folder import SETTINGS, WEIGHTS


@pytest.fixture
def evaluate(capsys):
    def run(*argv):
        capsys.readouterr()
        code = main([*map(str, argv), "--eval"])
        done = capsys.readouterr()
        return code, done.out.splitlines(), done.err

    return run


def test_the_settings_are_those_of_the_run(train, flags, run_folder, tmp_path, evaluate):
    """Whatever the command line leaves out: the figures are those of the end of training."""
    train("--pre_lnorm", "--local_size", 2, "--f_thres", 5)
    end = [x for x in (run_folder / "log.txt").read_text().splitlines() if "end of training" in x]
    expected = [line.split(" | ", 1)[1] for line in end]
    place = ["--work_dir", tmp_path / "runs", "--name", "run"]

    def figures(*argv, notes=()):
        code, lines, _ = evaluate(*argv)
        assert code == 0
        assert lines[:-2] == list(notes)
        return [line.split(" | ", 1)[1] for line in lines[-2:]]

    assert figures(*place) == expected
    assert figures("--load", run_folder / "checkpoint.pt") == expected
    notes = [
        "note: --f_thres is 6 in this evaluation, and 5 in the run",
        "note: --d_inner is 32, as in the run, and not 999",
    ]
    assert figures(*flags, "--d_inner", 999, notes=notes) != expected
    # Weights alone are evaluated by the command line, as published.
    shutil.copy(run_folder / WEIGHTS, tmp_path / "alone.pt")
    own = ["--load", tmp_path / "alone.pt", "--pre_lnorm", "--local_size", 2, "--f_thres", 5]
    assert figures(*flags, *own) == expected
    assert figures(*flags, *own[:2]) != expected


def test_another_vocabulary_is_refused(train, run_folder, corpus_folder, tmp_path, evaluate):
    """Even one of the same size: the words have other ids."""
    train()
    other = tmp_path / "other"
    for split in ("train", "valid", "test"):
        text = (corpus_folder / f"{split}.txt").read_text()
        other.mkdir(exist_ok=True)
        (other / f"{split}.txt").write_text(text.replace(" w1 ", " new "))
    place = ["--work_dir", tmp_path / "runs", "--name", "run"]
    code, _, err = evaluate(*place, "--data", other)
    assert code == 2
    assert f"{run_folder} was trained with the vocabulary " in err
    with pytest.raises(InputError, match="was trained with the vocabulary"):
        check_vocabulary(run_folder, get_lm_corpus(other, "wt103").vocab)
    # Older runs have not saved theirs.
    settings = json.loads((run_folder / SETTINGS).read_text())
    del settings["vocabulary"]
    (run_folder / SETTINGS).write_text(json.dumps(settings))
    assert evaluate(*place, "--data", other)[0] == 0


@pytest.fixture
def saved(tmp_path):
    """A folder with settings as a run saves them, and changes to these."""

    def write(*argv, **changes):
        settings = vars(parse(["--dataset", "demo", *argv])) | {"cutoffs": []} | changes
        (tmp_path / SETTINGS).write_text(json.dumps(settings))
        return tmp_path

    return write


def merged(folder, *argv):
    notes = []
    return evaluation_settings(["--eval", "--load", "x", *argv], folder, notes.append), notes


def test_every_setting_comes_back(saved):
    argv = (
        "--adaptive --cutoffs 9 20 --div_val 2 --wnorm --inject own --d_model 20 --n_head 2 "
        "--d_head 10 --lr 3e-05 --f_solver anderson:m=3 --b_solver None --seed 5 --varlen"
    ).split()
    folder = saved(*argv, name="-x", cuda=True, cutoffs=[9, 20])
    found, notes = merged(folder)
    expected = vars(parse(["--dataset", "demo", *argv])) | {"cuda": True}
    assert vars(found) == expected | {"eval": True, "load": "x"}
    assert notes == []


def test_what_an_evaluation_may_choose(saved):
    choice = {
        "--f_thres": "7", "--mem_len": "3", "--eval_batch_size": "2", "--data": "elsewhere",
        "--amp": "bf16", "--f_solver": "broyden", "--seed": "3", "--eval_tgt_len": "4",
    }  # fmt: skip
    found, notes = merged(saved(), *(word for pair in choice.items() for word in pair))
    assert {flag: str(getattr(found, flag[2:])) for flag in choice} == choice
    assert sorted(note.split()[1] for note in notes) == sorted(choice)


def test_of_the_same_length_is_the_memory_that_is_chosen(saved):
    found, notes = merged(saved("--same_length", "--mem_len", "8"), "--mem_len", "5")
    assert (found.mem_len, found.local_size) == (5, 5)
    assert "note: --local_size is 5 in this evaluation, and 8 in the run" in notes


def test_what_the_run_decides(saved):
    given = "--pre_lnorm --n_head 3 --lr 0.5 --tie_proj_mode shared --max_step 3".split()
    found, notes = merged(saved(), *given)
    assert vars(found) == vars(merged(saved())[0])
    assert "note: --pre_lnorm is False, as in the run, and not True" in notes
    flags = {word for word in given if word.startswith("--")}
    assert {note.split()[1] for note in notes} == flags


def test_a_run_of_other_versions(saved, tmp_path):
    """A flag that is newer than the run is free; a setting that no flag knows is refused."""
    folder = saved()
    settings = json.loads((folder / SETTINGS).read_text())
    del settings["tie_proj_mode"], settings["inject"]
    (folder / SETTINGS).write_text(json.dumps(settings))
    assert read_settings(folder / SETTINGS).tie_proj_mode == "apart"
    assert merged(folder, "--inject", "own")[0].inject == "own"
    with pytest.raises(InputError, match=r"settings\.json: unknown flag --shape"):
        merged(saved(shape=3))


def test_settings_that_are_missing(tmp_path):
    notes = []
    argv = ["--eval", "--name", "a", "--pre_lnorm", "--dataset", "demo"]
    assert evaluation_settings(argv, tmp_path, notes.append) == parse(argv)
    assert notes == [
        f"note: {tmp_path / SETTINGS} is missing, so the settings are those of the command line"
    ]
    assert merged(tmp_path)[1] == []  # weights alone, as published


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("n_layer", "2", "'2' is no value of --n_layer"),
        ("n_layer", True, "--n_layer"),
        ("n_layer", False, "False is no value of --n_layer"),
        ("n_layer", None, "None is no value of --n_layer"),
        ("n_layer", [2], "[2] is no value of --n_layer"),
        ("n_layer", {"a": 1}, "--n_layer"),
        ("n_layer", 2.5, "--n_layer"),
        ("n_layer", 0, "--n_layer is 0"),
        ("n_layer", 10**30, "--n_layer is 1000"),
        ("lr", float("nan"), "--lr"),
        ("lr", 10**400, "--lr"),
        ("wnorm", 1, "--wnorm"),
        ("cutoffs", ["--lr=3"], "--cutoffs"),
        ("cutoffs", [3, "4"], "--cutoffs"),
        ("optim", "adam", "--optim"),
        ("data", "a\0b", "--data"),
        ("f_solver", "anderson:x=1", "anderson has no option x"),
        ("a b", 1, "unknown flag --a b"),
    ],
)
def test_bad_settings_are_refused(saved, name, value, named):
    path = saved(**{name: value}) / SETTINGS
    with pytest.raises(InputError) as caught:
        merged(path.parent)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{", "\ufffd", "[" * 9000, "9" * 5000])
def test_files_without_settings_are_refused(tmp_path, text):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(InputError, match=r"settings of a run|not readable JSON"):
        merged(tmp_path)
    (tmp_path / SETTINGS).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="not readable JSON"):
        merged(tmp_path)


def test_the_chosen_are_flags():
    assert vars(parse([])).keys() >= CHOSEN
