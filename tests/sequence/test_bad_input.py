"""Bad input: one clear line that names the thing, exit code 2, and nothing written.

What the command line refuses by itself is in test_options.py, what the model refuses in
test_model_errors.py: here is that the command says so.
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deq_sequence.command import main
from lib.runs.retention import versions
from lib.runs.run_folder import CHECKPOINT, WEIGHTS

TRAIN = Path(__file__).parents[2] / "DEQ-Sequence" / "train_transformer.py"
TRAP = "executed"  # what the code in a malicious file would create


class Place:
    """Where one case happens: a copy of the small text, and a finished run to damage."""

    def __init__(self, folder: Path, flags: list[str], run: Path):
        self.folder, self.flags, self.run = folder, flags, run
        self.data = folder / "data"

    def weights(self, edit) -> list[str]:
        """Flags that load the run's weights after ``edit`` changed the state dict."""
        state = torch.load(self.run / WEIGHTS, weights_only=True)
        edit(state)
        torch.save(state, self.folder / "weights.pt")
        return ["--load", str(self.folder / "weights.pt")]


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def finished_run(corpus_folder, tmp_path_factory):
    """A short run to copy, with its command line."""
    parent = tmp_path_factory.mktemp("finished")
    return parent / "runs-wt103" / "run", ["--work_dir", str(parent / "runs"), "--name", "run"]


@pytest.fixture
def place(flags, corpus_folder, tmp_path, finished_run):
    run, places = finished_run
    if not run.exists():
        assert main([*flags, *places]) == 0
    shutil.copytree(corpus_folder, tmp_path / "data")
    own = tmp_path / "runs-wt103" / "run"
    shutil.copytree(run, own)
    return Place(tmp_path, [*flags, "--data", str(tmp_path / "data")], own)


# ---- the cases: each returns more flags, and what the message must name ----------------------

CASES = {}


def case(title):
    def add(function):
        CASES[title] = function
        return function

    return add


FRESH = ["--name", "fresh"]  # not the finished run
RESTART = ["--restart", "--max_step", "9"]


@case("missing data folder")
def _(place):
    return [*FRESH, "--data", str(place.folder / "nowhere")], str(place.folder / "nowhere")


@case("missing test.txt")
def _(place):
    (place.data / "test.txt").unlink()
    return FRESH, str(place.data / "test.txt")


@case("empty train.txt")
def _(place):
    (place.data / "train.txt").write_text("")
    return FRESH, str(place.data / "train.txt")


@case("not UTF-8")
def _(place):
    with open(place.data / "valid.txt", "ab") as file:
        file.write("naïve\n".encode("latin-1"))
    return FRESH, f"{place.data / 'valid.txt'}, line"


@case("seed beyond 64 bits")
def _(place):
    return [*FRESH, "--seed", "99999999999999999999"], "--seed"


@case("unknown flag")
def _(place):
    return [*FRESH, "--d_modle", "16"], "did you mean --d_model"


@case("flag without its value")
def _(place):
    return [*FRESH, "--lr"], "--lr"


@case("cutoffs beyond the vocabulary")
def _(place):
    return [*FRESH, "--adaptive", "--cutoffs", "50", "5000"], "5000"


@case("batch larger than the text")
def _(place):
    return [*FRESH, "--batch_size", "100000"], "100000"


@case("evaluation batch larger than the text")
def _(place):
    return [*FRESH, "--eval_batch_size", "100000"], "100000"


def only_the_newest(place):
    """A damaged checkpoint with one before it is no bad input: the run goes on from that one."""
    for older in versions(place.run / CHECKPOINT)[1:]:
        older.unlink()


@case("truncated checkpoint (--restart)")
def _(place):
    only_the_newest(place)
    content = (place.run / CHECKPOINT).read_bytes()
    (place.run / CHECKPOINT).write_bytes(content[: len(content) // 2])
    return RESTART, str(place.run / CHECKPOINT)


@case("truncated weights (--load)")
def _(place):
    content = (place.run / WEIGHTS).read_bytes()
    (place.folder / "cut.pt").write_bytes(content[: len(content) // 2])
    return [*FRESH, "--load", str(place.folder / "cut.pt")], str(place.folder / "cut.pt")


@case("empty weights (--eval)")
def _(place):
    (place.run / WEIGHTS).write_bytes(b"")
    return ["--eval"], str(place.run / WEIGHTS)


@case("missing weights (--eval)")
def _(place):
    return ["--eval", *FRESH], f"fresh/{WEIGHTS}"


@case("pickle with code in it (--load)")
def _(place):
    path = place.folder / "code.pkl"
    path.write_bytes(pickle.dumps(Opens(place.folder / TRAP)))
    return [*FRESH, "--load", str(path)], str(path)


@case("torch file with code in it (--load)")
def _(place):
    path = place.folder / "code.pt"
    torch.save({"model": {"x": Opens(place.folder / TRAP)}}, path)
    return [*FRESH, "--load", str(path)], str(path)


@case("checkpoint with code in it (--restart)")
def _(place):
    only_the_newest(place)
    state = torch.load(place.run / CHECKPOINT, weights_only=True)
    torch.save(state | {"x": Opens(place.folder / TRAP)}, place.run / CHECKPOINT)
    return RESTART, str(place.run / CHECKPOINT)


@case("corpus cache with code in it: read anew")
def _(place):
    torch.save({"key": Opens(place.folder / TRAP)}, place.data / "corpus.wt103.pt")
    return [*FRESH, "--n_head", "3"], "d_model"  # so far as the model, with the texts


@case("weights of another shape")
def _(place):
    def edit(state):
        state["inject_conv.bias"] = torch.zeros(3)

    return [*FRESH, *place.weights(edit)], "inject_conv.bias has shape (3,) instead of (48,)"


@case("weights with keys missing and too many")
def _(place):
    def edit(state):
        state["inject.bias"] = state.pop("inject_conv.bias")

    return [*FRESH, *place.weights(edit)], "missing inject_conv.bias; unexpected inject.bias"


@case("NaN weights")
def _(place):
    def edit(state):
        state["inject_conv.bias"][1] = torch.nan

    return [*FRESH, *place.weights(edit)], "not finite: inject_conv.bias"


@case("NaN weights (--eval)")
def _(place):
    def edit(state):
        state["inject_conv.bias"][1] = torch.nan

    return ["--eval", *place.weights(edit)], "not finite: inject_conv.bias"


@case("existing run without --restart")
def _(place):
    return [], "--restart"


@case("--restart without a run")
def _(place):
    return ["--restart", *FRESH], "fresh holds no run: check --name"


@case("--restart without a name")
def _(place):
    return ["--restart", "--name", "N/A"], "--restart_dir"


@case("--restart with another batch_size")
def _(place):
    return [*RESTART, "--batch_size", "2"], "--batch_size 4"


@case("folder of the run cannot be made")
def _(place):
    (place.folder / "file").write_text("")
    return ["--work_dir", str(place.folder / "file" / "runs")], str(place.folder / "file")


# ---- the test --------------------------------------------------------------------------------


def contents(folder):
    """Every file with its bytes, but the caches of texts, which are the command's to write."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("corpus."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("prepare", CASES.values(), ids=CASES)
def test_bad_input(place, capsys, monkeypatch, recwarn, prepare):
    monkeypatch.chdir(place.folder)
    more, named = prepare(place)
    before = contents(place.folder)
    capsys.readouterr()
    recwarn.clear()
    code = main([*place.flags, *more])
    captured = capsys.readouterr()
    assert code == 2
    *notes, line = captured.err.splitlines()
    assert all(note.endswith("the texts are encoded again") for note in notes)
    assert line.startswith("train_transformer.py: ")
    assert named in line
    assert captured.out == ""
    assert [str(w.message) for w in recwarn] == []  # lines too, outside of pytest
    assert contents(place.folder) == before
    assert not (place.folder / TRAP).exists()


def test_in_a_process_of_its_own(corpus_folder):
    """Nothing else on the error stream, not even from the imports."""
    command = [sys.executable, str(TRAIN), "--data", str(corpus_folder), "--batch_size", "100000"]
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_transformer.py: the text has")
    assert done.stdout == ""


def test_the_traps_work(tmp_path):
    """Unpickled without care, they do create the file."""
    pickle.loads(pickle.dumps(Opens(tmp_path / TRAP))).close()
    assert (tmp_path / TRAP).exists()
