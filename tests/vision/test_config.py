"""Configuration: files, overrides, folder flags, and what is refused."""

from argparse import Namespace
from contextlib import suppress
from math import inf, nan

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from mdeq_vision.config import config, flat, merge_file, update_config


def resolve(*opts, **args):
    cfg = config.clone()
    update_config(cfg, Namespace(opts=list(opts), **args))
    return cfg


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="settings.yaml"):
        path = tmp_path / name
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), "utf-8")
        return path

    return to_file


def changed(cfg) -> dict:
    before = flat(config)
    return {key: value for key, value in flat(cfg).items() if before.get(key) != value}


# --- Overrides --------------------------------------------------------------------------------

ACCEPTED = [
    ("TRAIN.LR", "0.5", 0.5),
    ("TRAIN.LR", "1", 1.0),
    ("TRAIN.LR", "1e-4", 1e-4),
    ("TRAIN.LR", 1, 1.0),
    ("TRAIN.CLIP", "-2", -2.0),
    ("TRAIN.END_EPOCH", "3", 3),
    ("TRAIN.SHUFFLE", "False", False),
    ("TRAIN.SHUFFLE", "false", False),
    ("TRAIN.SHUFFLE", "FALSE", False),
    ("TRAIN.NESTEROV", "true", True),
    ("TRAIN.NESTEROV", True, True),
    ("TRAIN.LR_STEP", "[30,60]", [30, 60]),
    ("TRAIN.LR_STEP", "(30, 60)", [30, 60]),
    ("TRAIN.LR_STEP", "30", [30]),
    ("TEST.SCALE_LIST", "[0.5, 1, 2]", [0.5, 1, 2]),
    ("TEST.SCALE_LIST", "0.5", [0.5]),
    ("GPUS", "(0,1)", [0, 1]),
    ("GPUS", "0,1", [0, 1]),
    ("GPUS", "[2]", [2]),
    ("GPUS", "1", [1]),
    ("MODEL.PRETRAINED", "5", "5"),
    ("DATASET.ROOT", "a folder/x=y", "a folder/x=y"),
    ("DATASET.ROOT", "True", "True"),
    ("MODEL.EXPANSION_FACTOR", "3", 3),
    ("MODEL.EXPANSION_FACTOR", "2.5", 2.5),
    ("MODEL.EXTRA.FINAL_CONV_KERNEL", "3", 3),
    ("MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS", "[8, 16]", [8, 16]),
    ("MODEL.EXTRA.FULL_STAGE.BLOCK", "BASIC", "BASIC"),
]


@pytest.mark.parametrize(("key", "value", "expected"), ACCEPTED)
def test_overrides(key, value, expected):
    found = changed(resolve(key, value))
    assert found == {key: expected}
    assert type(found[key]) is type(expected)


@pytest.mark.parametrize(("key", "value", "expected"), [a for a in ACCEPTED if "EXTRA" not in a[0]])
def test_files_take_the_same_values(key, value, expected, write):
    for part in reversed(key.split(".")):
        value = {part: value}
    assert changed(resolve(cfg=write(value))) == {key: expected}


WRONG_TYPES = [
    ("TRAIN.LR", "fast", "must be a number"),
    ("TRAIN.LR", "", "must be a number"),
    ("TRAIN.LR", "true", "must be a number"),
    ("TRAIN.LR", "[0.1]", "must be a number"),
    ("TRAIN.LR", "nan", "must be a number"),
    ("TRAIN.LR.X", "1", "not a section of keys"),
    ("TRAIN.END_EPOCH", "2.5", "must be an integer"),
    ("TRAIN.END_EPOCH", "True", "must be an integer"),
    ("TRAIN.SHUFFLE", "1", "must be True or False"),
    ("TF32", "high", "must be True or False"),
    ("COMPILE", "1", "must be True or False"),
    ("TRAIN.SHUFFLE", "maybe", "must be True or False"),
    ("TRAIN.LR_STEP", "soon", "must be a list"),
    ("GPUS", "(0,1", "must be a list"),
    ("GPUS", "all", "must be a list"),
    ("MODEL.EXPANSION_FACTOR", "wide", "EXPANSION_FACTOR"),
    ("MODEL.EXPANSION_FACTOR", "True", "EXPANSION_FACTOR"),
    ("TRAIN", "5", "a section of keys"),
    ("TRAIN", "{'LR': 5}", "a section of keys"),
    ("MODEL.EXTRA", "5", "a section of keys"),
]


@pytest.mark.parametrize(("key", "value", "named"), WRONG_TYPES)
def test_wrong_types(key, value, named, write):
    with pytest.raises(InputError, match=named) as caught:
        resolve(key, value)
    message = str(caught.value)
    assert key.removesuffix(".X") in message
    assert "command line" in message
    assert "\n" not in message
    for part in reversed(key.split(".")):
        value = {part: value}
    with pytest.raises(InputError, match=r"settings\.yaml"):
        resolve(cfg=write(value))


OUT_OF_RANGE = [
    ("PERCENT", 0), ("PERCENT", 1.1), ("PERCENT", -1), ("PRINT_FREQ", 0), ("SEED", -1),
    ("WORKERS", -1), ("DEQ.STOP_MODE", "both"), ("DEQ.F_THRES", 0), ("DEQ.B_THRES", -3),
    ("DEQ.RAND_F_THRES_DELTA", -1), ("LOSS.JAC_LOSS_FREQ", 1.5), ("TRAIN.OPTIMIZER", "adagrad"),
    ("TRAIN.LR_SCHEDULER", "linear"), ("TRAIN.LR", 0), ("TRAIN.LR", -1),
    ("TRAIN.BATCH_SIZE_PER_GPU", 0), ("TRAIN.PRETRAIN_STEPS", -1), ("TEST.SCALE_LIST", []),
    ("TEST.SCALE_LIST", [0]), ("MODEL.IMAGE_SIZE", [32]), ("TRAIN.IMAGE_SIZE", [32, 0]),
    ("TEST.IMAGE_SIZE", [32, "a"]), ("AMP", "fp16"), ("AMP", "BF16"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=str)
def test_out_of_range(key, value):
    with pytest.raises(InputError, match=key) as caught:
        resolve(key, value)
    assert repr(value) in str(caught.value) or repr(float(value)) in str(caught.value)


NOT_CHECKED = [
    ("TRAIN.LR", inf), ("TRAIN.WD", nan), ("TRAIN.MOMENTUM", nan), ("LOSS.JAC_LOSS_WEIGHT", nan),
    ("LOSS.JAC_LOSS_WEIGHT", -1.0), ("TRAIN.LR_STEP", ["a"]), ("GPUS", ["a"]), ("GPUS", []),
    ("GPUS", [-1]), ("MODEL.IMAGE_SIZE", [16.5, 16]), ("TEST.SCALE_LIST", [inf]),
    ("TRAIN.END_EPOCH", -3), ("TRAIN.LR_FACTOR", -0.1), ("TRAIN.LR_FACTOR", 0),
    ("TRAIN.EXTRA_EPOCH", -1), ("TRAIN.EXTRA_LR", 0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NOT_CHECKED, ids=str)
def test_values_without_sense(key, value):
    with pytest.raises(InputError, match=key):
        resolve(key, value)


HUGE = ["9" * 400, "-" + "9" * 400, "0x" + "f" * 9000, str(2**31)]


@pytest.mark.parametrize("value", HUGE, ids=len)
@pytest.mark.parametrize(
    "key", ["WORKERS", "TRAIN.LR", "TRAIN.SHUFFLE", "MODEL.EXPANSION_FACTOR", "MODEL.EXTRA.X"]
)
def test_numbers_beyond_all_measure(key, value, write):
    """Longer ones cannot become a float, or are too long for Python to print."""
    for number in (value, f"[{value}]"):
        if number == value or key == "MODEL.EXTRA.X":
            with pytest.raises(InputError, match=rf"{key} in the command line is .*2\^31"):
                resolve(key, number)
    *sections, name = key.split(".")
    text = f"{{{name}: {value}}}"
    for section in reversed(sections):
        text = f"{{{section}: {text}}}"
    with pytest.raises(InputError, match=rf"{key} in .*settings\.yaml is .*2\^31"):
        resolve(cfg=write(text))


def test_seeds_may_be_longer():
    assert resolve("SEED", str(2**63 - 1)).SEED == 2**63 - 1
    with pytest.raises(InputError, match=r"SEED in the command line is a number beyond 2\^63"):
        resolve("SEED", str(2**63))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("DATASET.ROOT", "a\0b", "zero byte"),
        ("MODEL.EXTRA.X", "['a', 'a\0b']", "zero byte"),
        ("MODEL.EXTRA.X", "1+2j", "a number, a text or a list of them"),
        ("MODEL.EXTRA.X", "{'a': b'1'}", "a number, a text or a list of them"),
        ("MODEL.EXTRA.X", "1e999", "finite"),
        ("TRAIN.LR", "{[]: 1}", "must be a number"),
        ("MODEL" + ".X" * 5000, "1", "at most 20 parts"),
        ("WORKERS", "1025", "at most 1024"),
    ],
    ids=range(8),
)
def test_values_that_no_program_holds(key, value, named):
    with pytest.raises(InputError, match=named) as caught:
        resolve(key, value)
    assert len(str(caught.value)) < 200


def test_limits_of_time_are_finite():
    with pytest.raises(InputError, match="MAX_TIME is inf"):
        resolve(max_time="9" * 400)


@pytest.mark.parametrize(("begin", "extra"), [(5, 0), (9, 0), (8, 3)])
def test_training_that_begins_at_its_end(begin, extra):
    opts = ["TRAIN.END_EPOCH", "5", "TRAIN.EXTRA_EPOCH", str(extra), "TRAIN.BEGIN_EPOCH"]
    opts = ["DATASET.EXTRA_TRAIN_SET", "a" if extra else "", *opts]
    with pytest.raises(InputError, match=f"BEGIN_EPOCH {begin} leaves no epoch.*at {5 + extra}"):
        resolve(*opts, str(begin))
    assert resolve(*opts, str(begin - 1 if begin != 9 else 4)).TRAIN.END_EPOCH == 5


def test_odd_number_of_overrides():
    for opts in (["TRAIN.LR"], ["TRAIN.LR", "1", "MODEL.WNORM"]):
        with pytest.raises(InputError, match=f"{opts[-1]}.*has no value"):
            resolve(*opts)


# --- Unknown keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("TRAIN.LEARNING_RATE", "TRAIN."),
        ("TRAIN.END_EPOCHS", "TRAIN.END_EPOCH"),
        ("DEQ.F_THRESH", "DEQ.F_THRES"),
        ("MODEL.NUM_LAYER", "MODEL.NUM_LAYERS"),
        ("OUTPUTDIR", "OUTPUT_DIR"),
        ("WORKER", "WORKERS"),
        ("MODEL.IMAGESIZE", "MODEL.IMAGE_SIZE"),
    ],
)
def test_unknown_key_names_the_nearest(key, near, write):
    with pytest.raises(InputError, match=f"unknown key {key} in the command.*did you mean {near}"):
        resolve(key, "1")
    content = "1"
    for part in reversed(key.split(".")):
        content = {part: content}
    with pytest.raises(InputError, match=rf"unknown key {key} in .*settings\.yaml.*mean {near}"):
        resolve(cfg=write(content))


@pytest.mark.parametrize("key", ["", ".", "TRAIN.", ".LR", "TRAIN..LR", "qqqqqqqqq", "RANK"])
def test_unknown_keys(key):
    with pytest.raises(InputError, match="unknown key"):
        resolve(key, "1")


@pytest.mark.parametrize(
    ("key", "near"), [("TRAN.LR", "TRAIN"), ("train.LR", "TRAIN"), ("TRAIN.lr", r"TRAIN\.LR")]
)
def test_unknown_section_or_case_names_the_nearest(key, near):
    with pytest.raises(InputError, match=f"did you mean {near}(\\.LR)?\\?"):
        resolve(key, "1")


STAGE = "MODEL.EXTRA.FULL_STAGE"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        (f"{STAGE}.NUM_BRNCHES", "NUM_BRANCHES"),
        (f"{STAGE}.num_blocks", "it has NUM_BRANCHES, "),
        (f"{STAGE}.DROPOUT", "it has NUM_BRANCHES, "),
        ("MODEL.EXTRA.FULLSTAGE.NUM_BRANCHES", "FULL_STAGE"),
        ("MODEL.EXTRA.Full_Stage", "FULL_STAGE"),
        ("MODEL.EXTRA.FINAL_KERNEL", "FINAL_CONV_KERNEL"),
    ],
)
def test_misspelt_keys_of_the_open_section(key, near):
    """It takes new keys for models of one's own, but the shape of ours has none."""
    known = [f"{STAGE}.NUM_BLOCKS", "[1]", "MODEL.EXTRA.FINAL_CONV_KERNEL", "1"]
    with pytest.raises(
        InputError, match=f"unknown key {key.removesuffix('.NUM_BRANCHES')}.*{near}"
    ):
        resolve(*known, key, "3")
    assert resolve(*known, "MODEL.EXTRA.STAGE1.NUM_BRANCHES", "3").MODEL.EXTRA.STAGE1


# --- Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "holds no settings"),
        ("# nothing", "holds no settings"),
        ("[1, 2]", "holds no settings"),
        ("- TRAIN: 1", "holds no settings"),
        ("text", "holds no settings"),
        ("TRAIN: [", "not a YAML file"),
        ("TRAIN: {LR: 1", "not a YAML file"),
        ("a: b: c", "not a YAML file"),
        (b"\xff\xfe\x00\x01", "not a YAML file"),
        (b"\x89PNG\r\n\x1a\n\x00", "not a YAML file"),
        ("OUTPUT_DIR: !!python/object/apply:os.getcwd []", "not a YAML file"),
        ("TRAIN:", "section of keys"),
        ("MODEL: {EXTRA: }", "section of keys"),
        ("LOG_DIR: null", "must be text"),
        ("DATASET: {ROOT: 2020-10-04}", "must be text"),
        ("1: 2", "unknown key 1"),
        ("TRAIN: {LR: 0.5}\nTEST: {}\nTRAIN: {WD: 0.5}", "TRAIN stands twice, in lines 1 and 3"),
        ("TRAIN: {LR: 0.5, LR: 0.5}", "LR stands twice, in lines 1 and 1"),
        ("MODEL: {EXTRA: &a {X: *a}}", "unless an alias leads in a circle"),
        ("TRAIN: {LR_STEP: &a [*a]}", "unless an alias leads in a circle"),
        ("? &a [*a]\n: 1", "circle"),
        (f"a: [{'[' * 30}{']' * 30}]", "20 levels"),
        (f"a: {'[' * 600}{']' * 600}", "not a YAML file"),
    ],
)
def test_bad_files(content, named, write):
    with pytest.raises(InputError, match=named) as caught:
        resolve(cfg=write(content))
    assert "settings.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_that_multiply(write):
    """A file of a few lines stands for 2^40 values."""
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    for last in ("", "? *a39\n: 1"):
        with pytest.raises(InputError, match="more than 10000 values"):
            resolve(cfg=write("\n".join([*lines, last])))


def test_plain_aliases_and_merged_sections(write):
    text = "TRAIN: &a {LR: 0.5}\nTEST: {SCALE_LIST: &b [0.5, 1]}\nMODEL: {EXTRA: {<<: *a, X: *b}}"
    cfg = resolve(cfg=write(text))
    assert cfg.MODEL.EXTRA == {"LR": 0.5, "X": [0.5, 1]}


@pytest.mark.parametrize(
    "content",
    ["DATASET: {ROOT: 2020-13-45}", "TRAIN: {LR: 0x_}", "MODEL: {EXTRA: {1: 2}}"],
)
def test_bad_files_that_fail_otherwise(content, write):
    cfg, path = config.clone(), write(content)
    try:
        update_config(cfg, Namespace(cfg=path))
    except InputError:
        return
    assert all(isinstance(key, str) for key in flat(cfg))


def test_missing_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, str(tmp_path / "none.yaml")):
        with pytest.raises(InputError, match=r"no configuration file.*experiments"):
            resolve(cfg=path)


def test_file_then_overrides_then_flags(write, tmp_path):
    content = {"TRAIN": {"LR": 0.5, "WD": 0.25}, "PERCENT": 0.5, "DATASET": {"ROOT": "cifar"}}
    path = write(content)
    folders = {"modelDir": "runs", "logDir": tmp_path, "dataDir": "data", "testModel": "best.pt"}
    opts = ["TRAIN.LR", "0.125", "PERCENT", "0.75"]
    cfg = resolve(*opts, cfg=str(path), percent=0.1, **folders)
    assert changed(cfg) == {
        "TRAIN.LR": 0.125,
        "TRAIN.WD": 0.25,
        "PERCENT": 0.1,
        "OUTPUT_DIR": "runs",
        "LOG_DIR": str(tmp_path),
        "DATA_DIR": "data",
        "DATASET.ROOT": "data/cifar",
        "TEST.MODEL_FILE": "best.pt",
    }


def test_arguments_may_lack_every_attribute():
    for args in (
        Namespace(),
        Namespace(cfg=None, opts=None, percent=None, modelDir=None),
        object(),
    ):
        cfg = config.clone()
        update_config(cfg, args)
        assert changed(cfg) == {}


def test_percent_of_nothing_is_refused():
    with pytest.raises(InputError, match="PERCENT"):
        resolve(percent=0.0)


def test_absolute_root_stays():
    assert resolve("DATASET.ROOT", "/data/x", dataDir="elsewhere").DATASET.ROOT == "/data/x"


# --- Objects ----------------------------------------------------------------------------------


def test_result_is_frozen_and_the_defaults_are_not_touched():
    before = config.dump()
    cfg = resolve("TRAIN.LR_STEP", "[7]", "MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS", "[8]")
    assert cfg.is_frozen()
    with pytest.raises(AttributeError):
        cfg.TRAIN.LR = 3.0
    with pytest.raises(AttributeError):
        cfg.MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS = [3]
    twin = cfg.clone()
    twin.TEST.SCALE_LIST.append(5)
    assert config.dump() == before
    assert "FULL_STAGE" not in config.MODEL.EXTRA


def test_twice_on_clones_and_on_one():
    """A frozen one may be changed again: notebooks do."""
    first = resolve("TRAIN.LR", "0.5", "MODEL.EXTRA.FULL_STAGE.NUM_BRANCHES", "2")
    second = resolve("TRAIN.LR", "0.5", "MODEL.EXTRA.FULL_STAGE.NUM_BRANCHES", "2")
    assert first == second
    update_config(second, Namespace(opts=["TRAIN.WD", "0.5"]))
    assert set(changed(second)) == {*changed(first), "TRAIN.WD"}
    assert second.is_frozen()
    assert first.TRAIN.WD == config.TRAIN.WD


def test_refusal_changes_nothing():
    cfg = resolve()
    with pytest.raises(InputError):
        update_config(cfg, Namespace(opts=["TRAIN.LR", "0.5", "NO.KEY", "1"]))
    assert changed(cfg) == {}
    assert cfg.is_frozen()


def test_saved_settings_are_read_back(write):
    """What a run saves: all types, open keys, empty texts and lists."""
    cfg = resolve(
        "TRAIN.LR", "1", "GPUS", "(0,1)", "LOG_DIR", "", "MODEL.EXPANSION_FACTOR", "2.5",
        "MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS", "[8,16]", "MODEL.EXTRA.FULL_STAGE.BLOCK", "BASIC",
        "DATASET.ROOT", "a: b # c", "MODEL.PRETRAINED", "null", "OUTPUT_DIR", "0x10",
        "TRAIN.LR_STEP", "[]",
    )  # fmt: skip
    again = config.clone()
    merge_file(again, write(cfg.dump()))
    assert flat(again) == flat(cfg)
    assert again == cfg


def test_saved_settings_can_be_used_again(write):
    """tools/cls_valid.py --cfg <run>/config.yaml."""
    cfg = resolve("DATASET.ROOT", "cifar10", dataDir="data")
    assert resolve(cfg=write(cfg.dump())) == cfg


TEXTS = st.text(st.characters(blacklist_categories=["Cs", "Cc"], max_codepoint=0x2FFF), max_size=12)


@settings(max_examples=30)
@given(
    lr=st.floats(1e-12, 1e6),
    root=TEXTS,
    flip=st.booleans(),
    epochs=st.integers(0, 10**9),
    steps=st.lists(st.integers(0, 999), max_size=4),
    factor=st.one_of(st.integers(1, 9), st.floats(0.5, 9)),
)
def test_any_values_survive_the_command_line_and_the_file(
    tmp_path_factory, lr, root, flip, epochs, steps, factor
):
    given_values = {
        "TRAIN.LR": lr,
        "DATASET.ROOT": root,
        "TRAIN.FLIP": flip,
        "TRAIN.END_EPOCH": epochs,
        "TRAIN.LR_STEP": steps,
        "MODEL.EXPANSION_FACTOR": factor,
    }
    opts = [part for key, value in given_values.items() for part in (key, str(value))]
    cfg = resolve(*opts)
    found = flat(cfg)
    assert {key: found[key] for key in given_values} == given_values
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(cfg.dump(), "utf-8")
    again = config.clone()
    merge_file(again, path)
    assert flat(again) == found


@settings(max_examples=30)
@given(key=st.text(max_size=20), value=st.text(max_size=20))
def test_any_text_is_a_setting_or_an_input_error(key, value):
    with suppress(InputError):
        resolve(key, value)
