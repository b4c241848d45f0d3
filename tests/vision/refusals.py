"""Bad input to the image tools: a place where it happens, and what has to follow."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from image_files import write_cifar10, write_cityscapes, write_imagenet
from lib.deq import DEQWarning
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOCK, LOG, METRICS, WEIGHTS
from mdeq_vision import command
from mdeq_vision.classes_file import CLASSES
from mdeq_vision.command import CONFIG
from mdeq_vision.datasets import digit_scenes
from small_runs import DIGITS, SCENES, TINY, TINY_DIGITS, run_tool

TRAP = "executed"  # what the code in a malicious file would create
PROGRAMS = {"extract": "extract_pretrained.py"}
STAGE = "MODEL.EXTRA.FULL_STAGE"

# Two narrow branches, and one epoch of two steps, where something is refused on the way.
NARROW = f"{STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4] {STAGE}.NUM_BLOCKS [1,1]".split()
NARROW += f"{STAGE}.NUM_BRANCHES 2 {STAGE}.BIG_KERNELS [0,0] WORKERS 0".split()
NARROW += ["KEEP_CHECKPOINTS", "1"]  # with another, a run goes on where the newest is damaged
CITYSCAPES = """
    DATASET.DATASET cityscapes DATASET.NUM_CLASSES 19 DATASET.TRAIN_SET list/cityscapes/train.lst
    DATASET.TEST_SET list/cityscapes/val.lst TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 64
    TEST.IMAGE_SIZE [64,32] TEST.BASE_SIZE 64 TEST.BATCH_SIZE_PER_GPU 2
    TRAIN.BATCH_SIZE_PER_GPU 2 TRAIN.PRETRAIN_STEPS 0 SAVE_FREQ 0
""".split()
IMAGENET = """
    DATASET.DATASET imagenet DATASET.TEST_SET val MODEL.NUM_CLASSES 3 MODEL.IMAGE_SIZE [16,16]
    TRAIN.PRETRAIN_STEPS 0 TRAIN.BATCH_SIZE_PER_GPU 3 SAVE_FREQ 0
""".split()


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class Place:
    """Where one case happens: small data sets and finished runs to damage."""

    def __init__(self, folder: Path, finished: Path, monkeypatch):
        self.folder, self.finished, self.monkeypatch = folder, finished, monkeypatch
        self.output, self.data = folder / "output", folder / "data"

    def run(self, kind: str) -> Path:
        """A finished run of 'digits' or 'digit_scenes', in the output folder."""
        (source,) = (self.finished / kind).iterdir()
        target = self.output / kind / source.name
        if not target.exists():
            shutil.copytree(source, target)
        return target

    def digits(self, *more) -> list[str]:
        return ["--cfg", str(DIGITS), "--modelDir", str(self.output), *TINY_DIGITS, *NARROW, *more]

    def scenes(self, *more) -> list[str]:
        sizes = ["PERCENT", "0.3", "TRAIN.IMAGE_SIZE", "[32,32]"]
        places = ["--cfg", str(SCENES), "--modelDir", str(self.output)]
        return [*places, *TINY, *sizes, *NARROW, *more]

    def cityscapes(self, *more) -> list[str]:
        """Settings for a small tree, which is written if there is none."""
        if not (self.data / "cityscapes").exists():
            write_cityscapes(self.data, size=(64, 32))
        return self.scenes("PERCENT", "1", *CITYSCAPES, "DATASET.ROOT", str(self.data), *more)

    def imagenet(self, *more) -> list[str]:
        if not (self.data / "images").exists():
            write_imagenet(self.data, per_class=2, size=(40, 30))
        return self.digits("PERCENT", "1", *IMAGENET, "DATASET.ROOT", str(self.data), *more)

    def cifar10(self, *more) -> list[str]:
        write_cifar10(self.data, per_batch=10)
        overrides = ["DATASET.DATASET", "cifar10", "DATASET.ROOT", str(self.data)]
        return self.digits(*overrides, *more)

    def file(self, pattern: str) -> Path:
        """The first file of the data that fits."""
        return sorted(self.data.rglob(pattern))[0]

    def yaml(self, edit, source: Path = DIGITS) -> str:
        """A changed copy of a settings file."""
        settings = yaml.safe_load(source.read_text())
        edit(settings)
        path = self.folder / "own.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def weights(self, edit, kind: str = "digits") -> str:
        """The weights of a run after ``edit`` changed the state dict; the run is not there."""
        (source,) = (self.finished / kind).iterdir()
        state = load(source / WEIGHTS)
        edit(state)
        path = self.folder / "weights.pt"
        torch.save(state, path)
        return str(path)

    def cut(self, path: Path) -> str:
        """Cut a file in half."""
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes most of the time of such a short run, and is tested elsewhere, is left out."""
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})
    monkeypatch.setattr(command, "model_summary", lambda *arguments: "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs to copy: digits/NAME and digit_scenes/NAME."""
    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, folder, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})
        short = ["TRAIN.END_EPOCH", "1"]
        assert run_tool("cls_train", *place.digits(*short)) == 0
        assert run_tool("seg_train", *place.scenes(*short)) == 0
    return folder / "output"


@pytest.fixture
def place(tmp_path, finished, monkeypatch):
    return Place(tmp_path, finished, monkeypatch)


def cases():
    """A dictionary of cases by title, and the decorator ``case(title)`` that adds to it.

    A case is given a Place and returns the tool, its arguments, and what the message must name.
    """
    found = {}

    def case(title, late=False):
        """``late``: it shows only when the files are read, when a run has begun."""

        def add(function):
            found[title] = pytest.param((function, late), id=title)
            return function

        return add

    return found, case


def contents(folder):
    """Every file with its bytes, and every folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def check(place, capfd, recwarn, case) -> None:
    """Run a case: exit code 2, one line that names the thing, nothing written."""
    prepare, late = case
    place.monkeypatch.chdir(place.folder)
    name, argv, *named = prepare(place)
    before = contents(place.folder)
    capfd.readouterr()
    recwarn.clear()
    code = run_tool(name, *argv)
    captured = capfd.readouterr()  # of the descriptors: workers print there
    assert code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{PROGRAMS.get(name, f'{name}.py')}: ")
    assert [part for part in named if part not in line] == []
    assert "Traceback" not in captured.out
    warned = [w for w in recwarn if not (late and w.category is DEQWarning)]
    assert [str(w.message) for w in warned] == []  # lines too, outside of pytest
    after = contents(place.folder)
    new = after.keys() - before.keys()
    if late:  # a run has begun, and saved what it had done
        files = {Path(path).name for path in new if after[path] is not None}
        assert {f for f in files if not f.startswith("events.")} <= {
            LOCK,
            LOG,
            METRICS,
            CONFIG,
            WEIGHTS,
            CHECKPOINT,
            CLASSES,
        }
    else:
        assert captured.out == ""
        assert new == set()
    assert {path: after[path] for path in before} == before
    assert not (place.folder / TRAP).exists()
