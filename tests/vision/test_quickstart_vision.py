"""The quickstart's two tasks, made small: runs, reports, pictures."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, Run, read_metrics
from mdeq_vision.datasets import digit_scenes
from mdeq_vision.quickstart import TASKS, main
from parameters import slow_but
from small_runs import ROOM, TINY_DIGITS, TINY_SCENES

# So few iterations do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")
STAGE = "MODEL.EXTRA.FULL_STAGE"
SMALL = f"""
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4]
    {STAGE}.NUM_BLOCKS [1,1] {STAGE}.BIG_KERNELS [0,0]
""".split()
OVERRIDES = {
    "digits": [*TINY_DIGITS, *SMALL],
    "scenes": [*TINY_SCENES, *SMALL, "PERCENT", "0.3"],
}
SCORES = {"digits": ("accuracy", "top1"), "scenes": ("mIoU", "mIoU")}


@pytest.fixture(autouse=True, scope="module")
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "N_SCENES", {"train": 40, "test": 8, "valid": 8})
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Stands for MDEQ-Vision."""
    folder = tmp_path_factory.mktemp("room")
    shutil.copytree(ROOM / "experiments", folder / "experiments")
    return folder


def quickstart(room, task, *more):
    return main([task, *OVERRIDES[task], *more], room)


def folder_of(room, task):
    (folder,) = (room / "output").glob(f"*{task}/*")
    return folder


# A restart does not look at the task.
one_task = pytest.mark.parametrize("finished", slow_but(["digits"], TASKS), indirect=True)


@pytest.fixture(scope="module", params=TASKS)
def finished(request, room):
    """A task and the folder of its run."""
    assert quickstart(room, request.param) == 0
    return request.param, folder_of(room, request.param)


def rows(text):
    """{title: [figures]} of the table's lines."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_report(finished):
    task, folder = finished
    title, score = SCORES[task]
    table, records = rows((folder / "report.txt").read_text()), read_metrics(folder)
    valid = [r for r in records if r["kind"] == "valid"]
    stacked = [r for r in valid if r["phase"] == "stacked"][-1]
    tested = {r["weights"]: r for r in records if r["kind"] == "final_test"}
    last = tested["last"]
    assert table[f"{title} (8 test images)"] == ["valid", "test"]
    assert table["this run, before its equilibrium phase"] == [f"{100 * stacked[score]:.2f}%"]
    for name, which in (("end of training", "last"), ("best in validation", "best")):
        step = tested[which]["of_step"]
        (chosen,) = (r for r in valid if r["step"] == step)
        figures = [f"{100 * r[score]:.2f}%" for r in (chosen, tested[which])]
        assert table[f"equilibrium ({name}, step {step})"] == figures

    solved = [r for r in records if r["kind"] == "train" and r["step"] > 4]
    for which in ("forward", "backward"):
        residual, nfe = map(float, table[f"{which}, training mean"])
        for found, name in ((residual, "rel_residual"), (nfe, "nfe")):
            mean = sum(r[f"{which}_{name}"] for r in solved) / len(solved)
            assert found == pytest.approx(mean, rel=0.01, abs=0.05 if name == "nfe" else 0)
    residual, nfe = map(float, table["forward, evaluation mean"])
    assert residual == pytest.approx(last["rel_residual"], rel=0.01)
    assert nfe == pytest.approx(last["nfe"], abs=0.05)
    (radius,) = [v for k, v in table.items() if k.startswith("spectral radius")]
    assert 0 < float(radius[0]) < 100
    assert re.fullmatch(r"\d+ MiB", table["peak memory"][0])


def pictures(folder):
    """Every PNG, decoded."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"
            found[path.name] = np.array(image.convert("RGB"))
    return found


def test_pictures(finished):
    task, folder = finished
    found = pictures(folder)
    assert sorted(found) == ["curves.png"] + ["scenes.png"] * (task == "scenes")
    text = (folder / "report.txt").read_text()
    for name, pixels in found.items():
        assert f"{name.removesuffix('.png')}: {folder / name}" in text
        assert min(pixels.shape[:2]) > 500
        assert len(np.unique(pixels @ (1, 2**8, 2**16))) > 10  # colours


@pytest.mark.parametrize("finished", ["scenes"], indirect=True)
def test_scenes_show_input_and_truth(finished):
    """The first scene: its pixels and its labels' colours are in the panel, enlarged."""
    panel = pictures(finished[1])["scenes.png"]
    image, labels = digit_scenes.render_scene("test", 0, (32, 32))
    palette = np.array(digit_scenes.DIGIT_SCENES.palette, np.uint8)
    for wanted in (image, palette[labels]):
        big = wanted.repeat(8, 0).repeat(8, 1)
        assert contains(panel, big), "the first scene is not in the panel"


def contains(panel, part):
    """Whether the panel shows ``part`` near its upper edge, up to a level or two."""
    height, width = part.shape[:2]
    corner = part[::37, ::41].astype(int)
    for top in range(min(80, panel.shape[0] - height)):
        for left in range(panel.shape[1] - width):
            window = panel[top : top + height : 37, left : left + width : 41]
            if np.abs(window - corner).max() <= 2:
                return True
    return False


def test_a_second_run_is_refused(finished, room, capsys):
    task, folder = finished
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    assert quickstart(room, task) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quickstart.py: ")
    assert str(folder) in line
    assert "--restart" in line
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@one_task
def test_restart_of_a_finished_run_reports_again(finished, room, capsys, tmp_path, monkeypatch):
    """From any folder: runs lie in the room, not in the current one."""
    task, folder = finished
    monkeypatch.chdir(tmp_path)
    before, records = rows((folder / "report.txt").read_text()), read_metrics(folder)
    assert quickstart(room, task, "--restart") == 0
    shown, after = rows(capsys.readouterr().out), rows((folder / "report.txt").read_text())
    assert read_metrics(folder) == records
    for name in before.keys() - {"peak memory"}:
        if not name.startswith(("curves", "scenes")):
            assert after[name] == before[name] == shown[name]
    assert list(tmp_path.iterdir()) == []


@one_task
def test_restart_goes_on(finished, room, tmp_path, monkeypatch):
    """Cut off in the middle: the same losses, and then a report."""
    task, whole = finished
    shutil.copytree(room / "experiments", tmp_path / "experiments")
    real = Run.record

    def record(self, kind, step, **values):
        real(self, kind, step, **values)
        if (kind, step) == ("train", 5):
            monkeypatch.setattr(Run, "record", real)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "record", record)
    assert quickstart(tmp_path, task) == 130
    cut = folder_of(tmp_path, task)
    assert load(cut / CHECKPOINT)["step"] == 4
    assert not (cut / "report.txt").exists()
    assert quickstart(tmp_path, task, "--restart") == 0
    losses, expected = ([r.get("loss") for r in read_metrics(f)] for f in (cut, whole))
    assert losses == expected
    weights, expected = load(cut / WEIGHTS), load(whole / WEIGHTS)
    assert all((weights[key] == expected[key]).all() for key in expected)
    assert (cut / "report.txt").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "task"),
        (["words"], "'words'"),
        (["digits", "--restrat"], "did you mean --restart?"),
        (["digits", "TRAIN.LRR", "1"], "did you mean TRAIN.LR?"),
        (["scenes", "TRAIN.LR"], "has no value"),
    ],
)
def test_bad_input(room, argv, named, capsys):
    assert main(argv, room) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quickstart.py: ")
    assert named in line


def test_debug_makes_no_report(tmp_path, capsys):
    shutil.copytree(ROOM / "experiments", tmp_path / "experiments")
    assert quickstart(tmp_path, "digits", "DEBUG.DEBUG", "True") == 0
    assert "spectral radius" not in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["experiments"]


@pytest.mark.parametrize("border", ["0", "6"])
def test_report_of_runs_of_one_phase(tmp_path, border):
    shutil.copytree(ROOM / "experiments", tmp_path / "experiments")
    assert quickstart(tmp_path, "digits", "TRAIN.PRETRAIN_STEPS", border) == 0
    assert (folder_of(tmp_path, "digits") / "report.txt").exists()
