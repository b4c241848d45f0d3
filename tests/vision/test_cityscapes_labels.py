"""What a label file of Cityscapes holds, by its name: label ids, train ids, or no labels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_files import settings, write_cityscapes
from lib.errors import InputError
from lib.runs.run_folder import LOG
from mdeq_vision import command
from mdeq_vision.datasets import CITYSCAPES, get_seg_dataset
from mdeq_vision.datasets.cityscapes_labels import check_names, read_train_ids
from mdeq_vision.datasets.geometry import IGNORE
from small_runs import SCENES, TINY, run_tool
from test_resume_vision import NARROW

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
LABELS, TRAIN = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
LISTS = {
    "TRAIN_SET": "list/cityscapes/train.lst",
    "TEST_SET": "list/cityscapes/val.lst",
    "NUM_CLASSES": 19,
}
# By the official table: -1 and 255 count for nothing.
OFFICIAL_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("city"), size=(64, 32))


@pytest.fixture
def city(pristine, tmp_path):
    """A tree to spoil."""
    return shutil.copytree(pristine, tmp_path / "data")


def items(root, split="test"):
    cfg = settings("cityscapes", root, DATASET=LISTS, TRAIN={"IGNORE_LABEL": 255})
    dataset = get_seg_dataset(cfg, split)
    return [dataset[i][1].numpy() for i in range(len(dataset))]


def rename(root, ending, change=lambda labels: labels, lists=("train", "val")):
    """Every label file under another ending, in files and lists, its values changed."""
    for path in (root / "cityscapes/gtFine").rglob(f"*{LABELS}"):
        new = path.with_name(path.name.removesuffix(LABELS) + ending)
        pixels = change(np.array(Image.open(path)))
        path.unlink()
        Image.fromarray(pixels).save(new)
    for name in lists:
        path = root / f"list/cityscapes/{name}.lst"
        path.write_text(path.read_text().replace(LABELS, ending))


def official_train_ids(label_ids):
    found = np.full_like(label_ids, 255)
    for train_id, label_id in enumerate(OFFICIAL_IDS):
        found[label_ids == label_id] = train_id
    return found


def refusal(root, split="test"):
    with pytest.raises(InputError) as error:
        items(root, split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", [TRAIN, "_gtCoarse_labelTrainIds.png", "_train_id.png"])
def test_train_ids_are_read_as_such(city, pristine, ending):
    """The same items as from the label ids; a label 7 is a traffic sign then, and no road."""
    rename(city, ending, official_train_ids)
    for found, expected in zip(items(city), items(pristine), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {int(label) for labels in items(city) for label in np.unique(labels)} > {0, 18, 255}


def test_coarse_labels_are_label_ids(city, pristine):
    rename(city, "_gtCoarse_labelIds.png")
    for found, expected in zip(items(city), items(pristine), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_values_that_are_no_train_ids_are_refused(city):
    """Label ids under the name of train ids: some are beyond 18."""
    rename(city, TRAIN)
    message = refusal(city)
    assert "Cityscapes has -1 to 18" in message
    assert f"frankfurt_000000_000019{TRAIN} have the train id" in message


def test_all_values_of_train_ids(tmp_path):
    path = tmp_path / f"a{TRAIN}"
    Image.fromarray(np.array([[*range(19), 255]], np.uint8)).save(path)
    assert read_train_ids(path).tolist() == [[*range(19), IGNORE]]
    Image.fromarray(np.array([[-1, 18, 255]], np.int32)).save(path.with_suffix(".tif"))
    assert read_train_ids(path.with_suffix(".tif")).tolist() == [[IGNORE, 18, IGNORE]]
    for wrong in (19, 254, -2):
        Image.fromarray(np.array([[wrong]], np.int32)).save(path.with_suffix(".tif"))
        with pytest.raises(InputError, match=f"have the train id {wrong}: "):
            read_train_ids(path.with_suffix(".tif"))


@pytest.mark.parametrize(
    "ending",
    """
    _gtFine_color.png _gtFine_instanceIds.png _gtFine_instanceTrainIds.png _gtCoarse_color.png
    _gtFine_polygons.png _disparity.png _leftImg8bit.png
    """.split(),
)
def test_other_files_are_refused_by_name(city, ending):
    """Before a run begins: an instance file without instances has label ids only."""
    rename(city, ending, lists=("val",))
    message = refusal(city)
    assert f"val.lst, line 1: {city}/cityscapes/" in message
    assert f"ends in {ending.rpartition('_')[2][:-4].lower()}, so it holds no labels" in message


def test_exchanged_columns_are_refused(city):
    path = city / "list/cityscapes/val.lst"
    lines = [" ".join(reversed(line.split())) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert "is named like labels, where an image is expected" in refusal(city)
    path.write_text("\n".join(line.split()[0] for line in lines))  # labels alone
    assert "is named like labels, where an image is expected" in refusal(city)


def test_labels_of_another_scene_are_refused(city):
    path = city / "list/cityscapes/val.lst"
    pairs = [line.split() for line in path.read_text().splitlines()]
    path.write_text("\n".join(f"{pairs[i][0]} {pairs[1 - i][1]}" for i in range(2)))
    message = refusal(city)
    assert "val.lst, line 1" in message
    assert "frankfurt_000001_000019_gtFine_labelIds.png are the labels of another scene" in message


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("a_leftImg8bit.png", "a_gtFine_labelIds.png"),
        ("a_leftImg8bit.png", "a_gtCoarse_labelTrainIds.png"),
        ("a_leftImg8bit_foggy_beta_0.02.png", "a_gtFine_labelIds.png"),
        ("00001.png", "labels/00001.png"),
        ("color.v2.png", "a_labelIds.PNG"),
        ("multicolor.png", "unicolor.png"),
        ("a_leftImg8bit.png", None),
    ],
)
def test_names_that_pass(image, labels):
    check_names(Path(image), labels and Path(labels))


def test_names_that_say_nothing_are_noted(city, tmp_path, pristine, capsys):
    """They are read as label ids, and the log says so."""
    rename(city, ".png")
    for found, expected in zip(items(city), items(pristine), strict=True):
        np.testing.assert_array_equal(found, expected)
    more = """
        DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 PERCENT 1 TRAIN.END_EPOCH 1
        DATASET.TRAIN_SET list/cityscapes/train.lst DATASET.TEST_SET list/cityscapes/val.lst
        TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 64 TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64
        TEST.BATCH_SIZE_PER_GPU 2 TRAIN.PRETRAIN_STEPS 9
    """.split()
    argv = ["--cfg", SCENES, "--modelDir", tmp_path, *TINY, *NARROW, *more, "DATASET.ROOT", city]
    assert run_tool("seg_train", *argv) == 0
    log = (command.run_folder(command.config, SCENES).name, LOG)
    log = (tmp_path / "cityscapes" / log[0] / log[1]).read_text()
    for name, count in (("train", 4), ("val", 2)):
        note = f"note: {count} label files of {city}/list/cityscapes/{name}.lst, such as "
        assert log.count(note) == 1
    capsys.readouterr()
    assert run_tool("seg_test", *argv) == 0
    assert "are read as label ids" in capsys.readouterr().out
    assert run_tool("seg_test", *argv, "DATASET.ROOT", pristine) == 0
    assert "are read as label ids" not in capsys.readouterr().out


# ---- pictures in place of labels -----------------------------------------------------------------


def coloured(train_ids):
    return np.array([*CITYSCAPES.palette, (0, 0, 0)], np.uint8)[train_ids]


@pytest.mark.parametrize("ending", [LABELS, TRAIN, ".png"])
def test_colours_counted_by_a_palette_are_refused(tmp_path, ending):
    """A program that saves a coloured picture in few bits numbers its colours as it likes."""
    rng = np.random.default_rng(0)
    train_ids = rng.choice([0, 2, 5, 10, 13, 19], (32, 64), p=[0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    path = tmp_path / f"a{ending}"
    picture = Image.fromarray(coloured(train_ids)).quantize(16)
    assert np.asarray(picture).max() < 16  # values that pass for labels
    picture.save(path)
    with pytest.raises(InputError, match="palette with the colours of other classes"):
        read_train_ids(path)


def test_labels_with_a_palette_are_labels(tmp_path):
    """To look at them: their own colours, another data set's, or grey."""
    rng = np.random.default_rng(0)
    label_ids = rng.integers(0, 34, (32, 64)).astype(np.uint8)
    expected = official_train_ids(label_ids)
    own = np.zeros((256, 3), np.uint8)
    own[list(OFFICIAL_IDS)] = CITYSCAPES.palette
    voc = np.zeros((256, 3), np.uint8)  # PASCAL's: the bits of the number, channel by channel
    for bit in range(8):
        voc[:, bit % 3] |= ((np.arange(256) >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    assert tuple(voc[21]) == CITYSCAPES.palette[0]  # a coincidence
    grey = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    for palette in (own, voc, grey):
        picture = Image.fromarray(label_ids, "L").convert("P")
        picture.putpalette(palette.ravel().tolist())
        picture.save(tmp_path / f"a{LABELS}")
        assert Image.open(tmp_path / f"a{LABELS}").mode == "P"
        np.testing.assert_array_equal(read_train_ids(tmp_path / f"a{LABELS}"), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "F"])
def test_other_modes_are_refused(tmp_path, mode):
    path = tmp_path / ("a_labelIds.tif" if mode == "F" else "a_labelIds.png")
    Image.fromarray(np.full((4, 6), 7, np.uint8)).convert(mode).save(path)
    with pytest.raises(InputError, match="one integer per pixel is expected"):
        read_train_ids(path)


def test_lossy_labels_are_refused(tmp_path):
    """Between a road (7) and a car (26), a JPEG has every other class."""
    labels = np.full((32, 32), 7, np.uint8)
    labels[:, 13:] = 26
    path = tmp_path / "a_labelIds.jpg"
    Image.fromarray(labels).save(path)
    assert len(np.unique(np.array(Image.open(path)))) > 2
    with pytest.raises(InputError, match="is a JPEG, which changes values: use PNG"):
        read_train_ids(path)
