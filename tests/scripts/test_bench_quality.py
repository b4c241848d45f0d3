"""bench_quality.py on tiny sizes: what it trains, what it keeps, its times and its tables."""

import json
import math

import bench_quality
import pytest

from lib.runs.run_folder import read_metrics
from small_digits import SMALL
from small_runs import TINY_DIGITS
from test_readme import TINY_WORDS


@pytest.fixture
def command(tmp_path, demo_folder, monkeypatch):
    """Run the command in this process; its exit code and what it trained."""
    extra = {"words": [*TINY_WORDS, "--data", str(demo_folder)], "digits": [*TINY_DIGITS, *SMALL]}
    best = "DEQ.F_START learned DEQ.GRAD jfb DEQ.F_SOLVER anderson DEQ.F_THRES 3"
    monkeypatch.setattr(bench_quality, "EXTRA", extra)
    monkeypatch.setitem(bench_quality.OPTIONS["digits"], "best", best)
    trained = []

    def here(function, *arguments):
        trained.append(arguments[:3])
        function(*arguments)

    monkeypatch.setattr(bench_quality, "in_new_process", here)

    def run(*argv):
        trained.clear()
        code = bench_quality.main(["--out", str(tmp_path / "runs"), *argv])
        return code, list(trained)

    return run


def folder(tmp_path, name):
    return tmp_path / f"runs/digits/{name}-1/digits/cls_mdeq_TINY"


def test_the_command(command, tmp_path, capsys):
    file = tmp_path / "quality.json"
    argv = ["--only", "digits", "--seeds", "1", "1", "--json", str(file)]
    assert command(*argv) == (0, [("digits", "published", 1), ("digits", "best", 1)])
    found = json.loads(file.read_text())
    published, best = found["runs"]
    records = read_metrics(folder(tmp_path, "best"))
    valid = [r for r in records if r["kind"] == "valid" and r["phase"] == "equilibrium"]
    assert best["final"] == valid[-1]["top1"]
    assert best["target"] == published["target"] == published["final"]
    # From zero, with the published solver and threshold; training takes its own.
    assert best["nfe"] == valid[-1]["nfe"] == published["nfe"] > best["training_nfe"]
    started = [r for r in records if r["kind"] == "with_start"]
    assert [r["step"] for r in started[: len(valid)]] == [r["step"] for r in valid]
    assert best["nfe_with_start"] == started[-1]["nfe"]
    assert (published["nfe_with_start"], published["steps_to_target"]) == (None, published["steps"])
    assert 0 < published["cpu_to_target"] <= published["cpu"]
    clocks = [r["cpu"] for r in records if r["kind"] == "clock"]
    assert clocks == sorted(clocks)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| digits, best") for line in lines)
    # Again: nothing is trained, the figures are the same, and those of other runs stay.
    other = {**published, "task": "scenes", "seed": 2}
    file.write_text(json.dumps({**found, "runs": [other, *found["runs"]]}))
    assert command(*argv) == (0, [])
    assert json.loads(file.read_text())["runs"] == [other, *found["runs"]]


def test_words_are_judged_as_the_published_options_solve(command, tmp_path, monkeypatch):
    flags = "--f_solver broyden --f_thres 5 --grad ift --optim Adam"
    options = {"published": flags, "best": "--f_start learned --f_thres 3"}
    monkeypatch.setitem(bench_quality.OPTIONS, "words", options)
    file = tmp_path / "quality.json"
    assert command("--only", "words", "--seeds", "1", "--json", str(file))[0] == 0
    runs = tmp_path / "runs/words-demo"
    records = {r["kind"]: r for r in read_metrics(next(runs.parent.glob("words*/best-1")))}
    assert records["valid"]["nfe"] == 6  # Broyden's method evaluates its start, too
    assert records["train"]["forward_nfe"] == 3
    tested = json.loads(file.read_text())["runs"][1]["test"]
    assert tested == pytest.approx(math.exp(records["final_test"]["loss"]))


def test_muon_on_both_sides(tmp_path):
    found = {
        (task, name): bench_quality.image_configuration(task, name, 1, tmp_path)[0]
        for task in ("scenes", "scenes-muon")
        for name in ("published", "best")
    }
    optimizers = [cfg.TRAIN.OPTIMIZER for cfg in found.values()]
    assert optimizers == ["adam", "muon", "muon", "muon"]
    assert len({cfg.OUTPUT_DIR for cfg in found.values()}) == 4  # runs of their own
    solvers = {cfg.DEQ.F_SOLVER for (_, name), cfg in found.items() if name == "published"}
    assert solvers == {"broyden"}


def run_of(name, valid, clock):
    """Records of a finished run with these validations (step, top1) and seconds by step."""
    solved = {"kind": "train", "step": 1, "forward_nfe": 6.0}
    more = {"phase": "equilibrium", "nfe": 9.0, "rel_residual": 1e-3}
    records = [{"kind": "valid", "step": step, name: value, **more} for step, value in valid]
    records += [{"kind": "clock", "step": s, "wall": 2 * t, "cpu": t} for s, t in clock.items()]
    return [solved, *records]


@pytest.mark.parametrize(
    ("task", "name", "values"),
    [("digits", "top1", (0.5, 0.9, 0.8)), ("words", "perplexity", (9, 5, 6))],
)
def test_the_time_to_the_target(task, name, values):
    clock = {10: 1.0, 20: 2.0, 30: 3.0}
    records = run_of(name, zip(clock, values, strict=True), clock)
    own = bench_quality.figures(task, records, None)
    assert (own["target"], own["steps_to_target"], own["cpu_to_target"]) == (values[2], 20, 2.0)
    assert (own["cpu"], own["wall"], own["wall_to_target"]) == (3.0, 6.0, 4.0)
    beyond = 0.95 if task == "digits" else 4.5
    assert bench_quality.figures(task, records, beyond)["cpu_to_target"] is None


def test_an_interrupted_run_keeps_its_seconds(command, tmp_path, monkeypatch):
    """A run that is stopped and continued counts the seconds of both parts."""
    trained, save = folder(tmp_path, "published"), bench_quality.Trainer.save
    stops = [KeyboardInterrupt]

    def stopping(self):
        save(self)
        if stops and self.step > 1:
            raise stops.pop()

    monkeypatch.setattr(bench_quality.Trainer, "save", stopping)
    assert command("--only", "digits", "--seeds", "1")[0] == 130
    (first, *_) = [r for r in read_metrics(trained) if r["kind"] == "clock"]
    assert command("--only", "digits", "--seeds", "1")[0] == 0
    clocks = [r["cpu"] for r in read_metrics(trained) if r["kind"] == "clock"]
    assert clocks == sorted(clocks)
    assert clocks[-1] > first["cpu"]


def test_bad_flags(command, capsys):
    assert command("--only", "sentences") == (2, [])
    assert capsys.readouterr().err.count("\n") == 1
