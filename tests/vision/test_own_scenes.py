"""Segmentation data of the user's own: classes.yaml, label files in every form, and refusals."""

import numpy as np
import pytest
from PIL import Image

from image_files import settings
from lib.errors import InputError
from mdeq_vision.datasets import get_seg_dataset
from mdeq_vision.datasets.geometry import IGNORE
from mdeq_vision.datasets.own_scenes import MOST, read_classes
from mdeq_vision.pictures import save_prediction

CLASSES = """\
classes:
  - {name: sky, colour: [10, 20, 30], labels: 7}
  - {name: "no", colour: [200, 0, 0], labels: [1, 300]}
  - {name: 3, colour: [0, 200, 0]}
ignore: [255, [0, 0, 0]]
"""
# In label files: sky, "no" by both of its values, 3 by its place in the list, ignored.
VALUES = np.array([[7, 1, 300], [2, 255, 7]])
TRAIN_IDS = [[0, 1, 1], [2, IGNORE, 0]]
SIZE = {"IMAGE_SIZE": [3, 2], "BASE_SIZE": 3, "MULTI_SCALE": False, "FLIP": False}


@pytest.fixture
def root(tmp_path):
    """Two scenes of one name in two folders."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((2, 3, 3), 9, np.uint8)).save(tmp_path / folder / "1.jpg")
        Image.fromarray(VALUES.astype(np.uint16)).save(tmp_path / folder / "1_labels.png")
    lines = "".join(f"{f}/1.jpg {f}/1_labels.png\n" for f in ("a", "b"))
    (tmp_path / "lists").mkdir()
    for name in ("train.lst", "val.lst"):
        (tmp_path / "lists" / name).write_text(lines)
    (tmp_path / "lists/classes.yaml").write_text(CLASSES)
    return tmp_path


def dataset(root, split, n=3, **lists):
    sets = {"TRAIN_SET": "lists/train.lst", "TEST_SET": "lists/val.lst", "NUM_CLASSES": n}
    return get_seg_dataset(settings("own_scenes", root, DATASET=sets | lists, TRAIN=SIZE), split)


def classes_of(tmp_path, text):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    return read_classes(path)


def test_items(root):
    for split in ("train", "valid", "test"):
        data = dataset(root, split)
        assert [data.name(i) for i in range(len(data))] == ["a/1", "b/1"]
        labels = data[1][1].numpy()
        assert np.where(labels == -1, IGNORE, labels).tolist() == TRAIN_IDS
    assert data.facts.class_names == ("sky", "no", "3")
    assert data.facts.palette == ((10, 20, 30), (200, 0, 0), (0, 200, 0))
    assert data.notes == ["classes: sky, no, 3"]


def test_predictions_have_the_values_of_the_files(root, tmp_path):
    """The first value of each class; with one above 255, in 16 bits."""
    classes_of(tmp_path / "lists", CLASSES.replace("[1, 300]", "[300, 1]"))
    data = dataset(root, "test")
    save_prediction(tmp_path / "out", data.name(1), data.picture(1), TRAIN_IDS[:1] * 2, data.facts)
    with Image.open(tmp_path / "out/labels/b/1.png") as image:
        assert np.array(image).tolist() == [[7, 300, 300]] * 2
    with Image.open(tmp_path / "out/colours/b/1.png") as image:
        assert np.array(image)[0].tolist() == [[10, 20, 30], [200, 0, 0], [200, 0, 0]]


def test_what_yaml_would_lose(tmp_path):
    for text in (f"classes: []\n{CLASSES}", CLASSES.replace("name: sky", "name: sea, name: sky")):
        with pytest.raises(InputError, match="stands twice, in lines"):
            classes_of(tmp_path, text)


@pytest.mark.parametrize("name", ["sky\\nblue", "sky ", " ", "a\\tb", "\\ud800"])
def test_names_are_words_of_one_line(tmp_path, name):
    with pytest.raises(InputError, match=r"class 0: name is .* text of one line"):
        classes_of(tmp_path, CLASSES.replace("sky", f'"{name}"'))


@pytest.mark.parametrize(
    ("old", "new"),
    [("sky", "sea"), ("labels: 7", "labels: 8"), ("[10, 20, 30]", "[10, 20, 31]")],
)
def test_a_run_goes_on_with_its_own_classes(root, old, new):
    """As pixels get their classes by this file."""
    before = dataset(root, "train").class_fingerprint
    assert dataset(root, "test").class_fingerprint == before
    classes_of(root / "lists", CLASSES.replace(old, new))
    assert dataset(root, "train").class_fingerprint != before


def test_data_with_other_classes_than_those_of_the_training(root):
    dataset(root, "test", CLASSES=["sky", "no", "3"])
    with pytest.raises(InputError, match=r"class 1 of own_scenes is 'no', but .* with 'yes' there"):
        dataset(root, "test", CLASSES=["sky", "yes", "3"])


def test_images_without_labels_are_predicted(root):
    (root / "lists/new.lst").write_text("a/1.jpg\n")
    data = dataset(root, "test", TEST_SET="lists/new.lst")
    assert not data.has_labels
    assert (data[0][1] == -1).all()


def written(path, form):
    """VALUES, in one of the forms of label files; 300 only where it fits."""
    small = np.where(VALUES == 300, 1, VALUES).astype(np.uint8)
    colours = np.array([(10, 20, 30), (200, 0, 0), (0, 200, 0)] + [(0, 0, 0)] * 253, np.uint8)
    picture = colours[np.array(TRAIN_IDS)]
    image = {
        "L": lambda: Image.fromarray(small),
        "I;16": lambda: Image.fromarray(VALUES.astype(np.uint16)),
        "P": lambda: _with_palette(small),
        "RGB": lambda: Image.fromarray(picture),
        "RGBA": lambda: Image.fromarray(picture).convert("RGBA"),
    }[form]()
    image.save(path)
    with Image.open(path) as read:
        assert read.mode == form


def _with_palette(values):
    """Each value has the colour of its class."""
    image = Image.fromarray(values, "P")
    palette = [0] * 768
    for value, colour in ((7, (10, 20, 30)), (1, (200, 0, 0)), (2, (0, 200, 0))):
        palette[3 * value : 3 * value + 3] = colour
    image.putpalette(palette)
    return image


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("form", ["L", "I;16", "P", "RGB", "RGBA"])
def test_forms_of_label_files(tmp_path, form):
    classes = classes_of(tmp_path, CLASSES)
    written(tmp_path / "labels.png", form)
    found = classes.read(tmp_path / "labels.png")
    assert found.dtype == np.uint8
    assert found.tolist() == TRAIN_IDS


def test_masks(tmp_path):
    """Of one bit; and of 0 and 255, which is then not ignored."""
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    Image.fromarray(np.array([[255, 0]], np.uint8)).save(tmp_path / "byte.png")
    two = "classes: [{name: a, colour: [0, 0, 0]}, {name: b, colour: [9, 9, 9], labels: %s}]"
    assert classes_of(tmp_path, two % 1).read(tmp_path / "bit.png").tolist() == [[1, 0]]
    assert classes_of(tmp_path, two % 255).read(tmp_path / "byte.png").tolist() == [[1, 0]]


@pytest.mark.parametrize("n", [1, MOST])
def test_any_number_of_classes(root, n):
    entries = "".join(f"  - {{name: c{i}, colour: [{i}, 0, 1]}}\n" for i in range(n))
    (root / "lists/classes.yaml").write_text(f"classes:\n{entries}")
    Image.fromarray(np.full((2, 3), n - 1, np.uint8)).save(root / "a/1_labels.png")
    labels = dataset(root, "train", n)[0][1]
    assert (labels == n - 1).all()
    with pytest.raises(InputError, match=f"own_scenes has {n} classes: set it to {n}"):
        dataset(root, "train", n + 1)


# ---- refusals ------------------------------------------------------------------------------------

ONE = "classes: [{name: a, colour: [0, 0, 0]%s}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not a YAML file"),
        ("- 1", "is [1], but must be the keys classes, ignore with values"),
        ("classes: [{name: a, colour: [0, 0, 0]}]\nigonre: 255", "'igonre': did you mean ignore?"),
        ("ignore: 255", ": classes is None, but must be a list of 1 to 255 classes"),
        ("classes: []", ": classes is []"),
        ("classes: [sky]", ", class 0 is 'sky', but must be the keys name"),
        ("classes: [{name: no, colour: [0, 0, 0]}]", "class 0: name is False, but must be text"),
        ("classes: [{colour: [0, 0, 0]}]", "class 0: name is None"),
        ("classes: [{name: a}]", "class 0: colour is None, but must be three numbers from 0"),
        ("classes: [{name: a, colour: [0, 0, 256]}]", "class 0: colour is [0, 0, 256]"),
        ("classes: [{name: a, colour: '#aabbcc'}]", "class 0: colour is '#aabbcc'"),
        (ONE % ", labels: -1", "class 0: labels is [-1], but must be numbers from 0 to 65535"),
        (ONE % ", labels: []", "class 0: labels is []"),
        (ONE % ", labels: [0, 0]", "class 0: 0 stands twice"),
        (ONE % "" + "\nignore: [0]", "ignore: 0 stands twice"),
        (ONE % "" + "\nignore: sky", "ignore is 'sky', but must be a list of labels"),
        ("classes: &a [*a]", "unless an alias leads in a circle"),
        (
            "classes: [{name: a, colour: [0, 0, 0]}, {name: a, colour: [0, 0, 1]}]",
            "class 1: 'a' stands twice",
        ),
        (
            "classes: [{name: a, colour: [0, 0, 0]}, {name: b, colour: [0, 0, 0]}]",
            "class 1: (0, 0, 0) stands twice",
        ),
    ],
)
def test_bad_classes(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        classes_of(tmp_path, text)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "classes.yaml"))
    assert "\n" not in str(error.value)


def test_too_many_classes(tmp_path):
    entries = ", ".join(f"{{name: c{i}, colour: [{i}, 0, 1]}}" for i in range(MOST + 1))
    with pytest.raises(InputError, match="a list of 1 to 255 classes"):
        classes_of(tmp_path, f"classes: [{entries}]")


def test_missing_classes(root):
    (root / "lists/classes.yaml").unlink()
    with pytest.raises(InputError, match=r"lists/classes\.yaml cannot be read .*write the classes"):
        dataset(root, "test")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.array([[7, 9]], np.uint8), "label 9"),
        (np.array([[7, 65535]], np.uint16), "label 65535"),
        (np.full((1, 2, 3), 5, np.uint8), r"colour \[5, 5, 5\]"),
    ],
)
def test_labels_that_no_class_has(tmp_path, values, named):
    Image.fromarray(values).save(tmp_path / "1.png")
    wanted = rf"labels .*1\.png have the {named}, which .*classes\.yaml does not name"
    with pytest.raises(InputError, match=wanted):
        classes_of(tmp_path, CLASSES).read(tmp_path / "1.png")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_a_palette_of_other_classes(tmp_path):
    """A coloured picture with a palette: its values would be taken for classes."""
    written(tmp_path / "1.png", "P")
    other = CLASSES.replace("labels: 7", "labels: 1").replace("[1, 300]", "7")
    with pytest.raises(InputError, match="a palette with the colours of other classes"):
        classes_of(tmp_path, other).read(tmp_path / "1.png")
