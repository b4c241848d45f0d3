"""seg_test: its figures are those of an independent count over the files that it writes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from image_files import write_cityscapes
from lib.runs.processes import Processes
from mdeq_vision import command
from mdeq_vision.datasets import digit_scenes, get_seg_dataset
from mdeq_vision.model import MDEQNet, MDEQSegNet
from mdeq_vision.options import experiment_parser
from small_runs import SCENES, run_tool
from small_vision import fill

# The official ids of the classes that count, and some colours of the official palette.
OFFICIAL = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
COLOURS = {7: (128, 64, 128), 11: (70, 70, 70), 23: (70, 130, 180), 26: (0, 0, 142)}
NAMES = "road sidewalk building wall fence pole traffic_light traffic_sign vegetation".split()
STAGE = "MODEL.EXTRA.FULL_STAGE"
MODEL = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.BIG_KERNELS [0,0] DEQ.F_THRES 6 WORKERS 0 TEST.BATCH_SIZE_PER_GPU 1
""".split()
CITYSCAPES = """
    DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 DATASET.TRAIN_SET list/cityscapes/train.lst
    DATASET.TEST_SET list/cityscapes/val.lst TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64
""".split()
WINDOWS = """
    TEST.IMAGE_SIZE [32,24] TEST.MULTI_SCALE True TEST.SCALE_LIST [0.5,1,1.25] TEST.FLIP_TEST True
""".split()


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 4, "test": 6, "valid": 6})


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    return write_cityscapes(root, n_train=1, n_val=4, n_test=3, size=(64, 32))


@pytest.fixture
def argv(city, tmp_path):
    """Settings of a model whose every weight matters, for the small Cityscapes."""
    argv = ["--cfg", str(SCENES), "--modelDir", str(tmp_path), *MODEL, *CITYSCAPES]
    return with_weights([*argv, "DATASET.ROOT", str(city)], tmp_path)


@pytest.fixture
def scenes(tmp_path):
    argv = [
        "--cfg",
        str(SCENES),
        "--modelDir",
        str(tmp_path),
        *MODEL,
        "TRAIN.IMAGE_SIZE",
        "[32,32]",
    ]
    return with_weights(argv, tmp_path)


def with_weights(argv, folder):
    """Weights with which many classes are predicted, in about equal shares."""
    cfg = settings(argv)
    model = MDEQSegNet(cfg)
    fill(model)
    image, _ = get_seg_dataset(cfg, "test")[0]
    with torch.no_grad():
        logits = model.eval()(image[None])[0]
        deviation, mean = torch.std_mean(logits, dim=(0, 2, 3))
        last = model.last_layer[-1]
        last.weight.div_(deviation.view(-1, 1, 1, 1))
        last.bias.sub_(mean).div_(deviation)
    torch.save(model.state_dict(), folder / "weights.pt")
    return [*argv, "TEST.MODEL_FILE", str(folder / "weights.pt")]


def settings(argv):
    return command.load_config(experiment_parser("seg_test.py", "").parse_intermixed_args(argv))


def predictions(argv):
    return command.run_folder(settings(argv), SCENES) / "predictions"


def pixels(path):
    with Image.open(path) as image:
        return np.array(image), image.mode


def truth_and_prediction(folder, city, ids=OFFICIAL):
    """Official ids of all pixels of the classes that count, and what was predicted there."""
    labels, predicted = [], []
    for path in sorted((folder / "labels").iterdir()):
        stem = path.stem.removesuffix("_leftImg8bit")
        (file,) = (city / "cityscapes/gtFine").rglob(f"{stem}_gtFine_labelIds.png")
        label = pixels(file)[0]
        counts = np.isin(label, ids)
        labels.append(label[counts])
        predicted.append(pixels(path)[0][counts])
    return np.concatenate(labels), np.concatenate(predicted)


@pytest.mark.parametrize("more", [[], WINDOWS], ids=["whole", "windows, scales, flips"])
def test_figures_are_those_of_the_files(argv, city, capsys, more):
    argv = [*argv, *more]
    found = command.predict_segmentation(settings(argv), SCENES, Processes())
    truth, predicted = truth_and_prediction(predictions(argv), city)
    assert len(np.unique(predicted)) > 8, "a constant prediction would prove little"
    matrix = confusion_matrix(truth, predicted, labels=OFFICIAL)
    assert found.confusion.matrix.tolist() == matrix.tolist()
    present = [i for i in OFFICIAL if i in truth or i in predicted]
    iou = jaccard_score(truth, predicted, labels=present, average=None)
    recalls = [(predicted[truth == i] == i).mean() for i in OFFICIAL if i in truth]
    figures = {
        "mIoU": iou.mean(),
        "pixel_accuracy": (truth == predicted).mean(),
        "mean_accuracy": np.mean(recalls),
    }
    for name, value in figures.items():
        assert found.figures[name] == pytest.approx(value, abs=1e-12)

    out = capsys.readouterr().out
    for name, value in figures.items():
        assert f" {name} {100 * value:.2f}%" in out
    table = dict(re.findall(r"^(\w+) +([\d.]+|-)$", out, re.MULTILINE))
    assert list(table)[:9] == NAMES
    shares = dict(zip(present, iou, strict=True))
    expected = [f"{100 * shares[i]:.2f}" if i in shares else "-" for i in OFFICIAL]
    assert list(table.values()) == expected
    assert f"predictions in {predictions(argv)}" in out


@pytest.mark.parametrize("more", [[], WINDOWS], ids=["whole", "windows, scales, flips"])
def test_without_labels(argv, city, capsys, more):
    argv = [*argv, *more, "DATASET.TEST_SET", "list/cityscapes/test.lst"]
    assert run_tool("seg_test", *argv) == 0
    out = capsys.readouterr().out
    assert "3 images without labels" in out
    assert "mIoU" not in out
    assert "nan" not in out
    folder = predictions(argv)
    names = [f"berlin_{i:06d}_000019_leftImg8bit.png" for i in range(3)]
    assert sorted(p.name for p in folder.iterdir()) == ["colours", "labels", "overlays"]
    for kind in ("labels", "colours", "overlays"):
        assert sorted(p.name for p in (folder / kind).iterdir()) == names
    for name in names:
        check_pictures(folder, name, city / "cityscapes/leftImg8bit/test/berlin" / name)


def check_pictures(folder, name, picture):
    """Sizes, modes, ids and colours of one image's three files."""
    label, mode = pixels(folder / "labels" / name)
    assert (label.shape, label.dtype, mode) == ((32, 64), np.uint8, "L")
    assert set(np.unique(label)) <= set(OFFICIAL)
    colour, mode = pixels(folder / "colours" / name)
    assert (colour.shape, mode) == ((32, 64, 3), "RGB")
    for label_id in np.unique(label):
        of_class = np.unique(colour[label == label_id], axis=0)
        assert len(of_class) == 1
        if label_id in COLOURS:
            assert tuple(of_class[0]) == COLOURS[label_id]
    assert len(np.unique(colour.reshape(-1, 3), axis=0)) == len(np.unique(label))
    both, mode = pixels(folder / "overlays" / name)
    assert (both.shape, mode) == ((32, 128, 3), "RGB")
    before = pixels(picture)[0]
    assert (both[:, :64] == before).all()
    assert np.abs(both[:, 64:] - (before / 2 + colour / 2)).max() <= 0.5


def test_scenes(scenes, capsys):
    """The embedded data set: ids are classes, and figures fit the files, too."""
    assert run_tool("seg_test", *scenes) == 0
    out = capsys.readouterr().out
    data = get_seg_dataset(settings(scenes), "test")
    truth = np.stack([data[i][1].numpy() for i in range(len(data))])
    folder = predictions(scenes) / "labels"
    predicted = np.stack([pixels(folder / f"test_{i:04d}.png")[0] for i in range(len(data))])
    matrix = confusion_matrix(truth.ravel(), predicted.ravel(), labels=range(11))
    with np.errstate(invalid="ignore"):
        iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert f"mIoU {100 * np.nanmean(iou):.2f}%" in out
    assert "6 images" in out


def test_predictions_are_those_of_the_equilibrium(argv, monkeypatch):
    """Also those of flipped images and of windows."""
    calls = []
    real = MDEQNet.forward

    def forward(self, x, train_step=-1, **options):
        calls.append((train_step, self.training))
        return real(self, x, train_step=train_step, **options)

    monkeypatch.setattr(MDEQNet, "forward", forward)
    assert run_tool("seg_test", *argv, *WINDOWS, "TRAIN.PRETRAIN_STEPS", "1000") == 0
    # Scale 0.5 fits a window; 64x32 takes 3x2 windows or so, 80x40 more; all of it twice.
    assert len(calls) >= 4 * 2 * (1 + 4 + 4)
    assert set(calls) == {(-1, False)}


def test_a_sample_of_the_images(argv, capsys):
    assert run_tool("seg_test", *argv, "TEST.NUM_SAMPLES", "2") == 0
    assert len(list((predictions(argv) / "labels").iterdir())) == 2
    assert "| 2 images |" in capsys.readouterr().out


def test_debug_writes_nothing(argv, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run_tool("seg_test", *argv, "DEBUG.DEBUG", "True") == 0
    out = capsys.readouterr().out
    assert "mIoU" in out
    assert "nothing written (debug)" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_images_of_different_sizes_one_by_one(argv, tmp_path, capsys):
    root = write_cityscapes(tmp_path / "data", n_train=1, n_val=2, size=(64, 32))
    for path in (root / "cityscapes").rglob("frankfurt_000001*.png"):
        Image.open(path).crop((0, 0, 50, 27)).save(path)
    argv = [*argv, "DATASET.ROOT", str(root)]
    assert run_tool("seg_test", *argv) == 0
    sizes = {pixels(p)[0].shape for p in (predictions(argv) / "labels").iterdir()}
    assert sizes == {(32, 64), (27, 50)}


CROP = "TEST.CENTER_CROP_TEST True TEST.IMAGE_SIZE [40,20] TEST.BASE_SIZE 64".split()


@pytest.mark.parametrize(
    ("more", "inputs"),
    [
        ([], {(20, 40)}),
        # Scales are of the cut centre; at the larger one it no longer fits the window.
        (["TEST.MULTI_SCALE", "True", "TEST.SCALE_LIST", "[0.5,2]"], {(10, 20), (20, 40)}),
    ],
)
def test_centre_crop(argv, city, monkeypatch, more, inputs):
    """The network sees the centre as it is; figures, files and overlays are of the centre."""
    sizes = set()
    real = MDEQNet.forward

    def forward(self, x, *args, **options):
        sizes.add(tuple(x.shape[2:]))
        return real(self, x, *args, **options)

    monkeypatch.setattr(MDEQNet, "forward", forward)
    argv = [*argv, *CROP, *more]
    found = command.predict_segmentation(settings(argv), SCENES, Processes())
    assert sizes == inputs
    window = (slice(6, 26), slice(12, 52))
    matrix = 0
    for path in sorted((predictions(argv) / "labels").iterdir()):
        stem = path.stem.removesuffix("_leftImg8bit")
        (file,) = (city / "cityscapes/gtFine").rglob(f"{stem}_gtFine_labelIds.png")
        truth, predicted = pixels(file)[0][window], pixels(path)[0]
        counts = np.isin(truth, OFFICIAL)
        matrix += confusion_matrix(truth[counts], predicted[counts], labels=OFFICIAL)
        (image,) = (city / "cityscapes/leftImg8bit").rglob(path.name)
        both = pixels(predictions(argv) / "overlays" / path.name)[0]
        np.testing.assert_array_equal(both[:, :40], pixels(image)[0][window])
    assert found.confusion.matrix.tolist() == matrix.tolist()


def test_spectral_radius(argv, capsys):
    assert run_tool("seg_test", *argv, "DEQ.SPECTRAL_RADIUS_MODE", "True") == 0
    (radius,) = re.findall(r"spectral radius ([\d.]+)", capsys.readouterr().out)
    assert 0 < float(radius) < 100
