"""The report of runs: a page by itself, with the records' own figures, of any run in any state."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import report
from lib.runs.run_folder import LOG, METRICS, Run
from run_report.charts import charts
from run_report.command import main
from run_report.page import MARK, page
from run_report.reading import read_runs

BORDER, LAST = 40, 100
DIVERGED = {"pass": "forward", "rel_residual": 3.0, "nfe": 6, "rank": 0}


class Page(HTMLParser):
    """What the tests ask of a page: addresses, figures, data, tables, text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.problems = [], [], []
        self.data, self.rows, self.captions, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "data":
            self.data.append(float(dict(attributes)["value"]))
        elif tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "figcaption" in self.open:
            self.captions[-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == name)
        return found

    @property
    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def words(folder: Path, **changes) -> Path:
    """A run of words with all that the trainer can record."""
    settings = {"dataset": "demo", "pretrain_steps": BORDER, "max_step": LAST, "lr": 0.1} | changes
    settings |= {"f_solver": "anderson", "stop_mode": "rel"}
    run = Run(folder, ("settings.json", json.dumps(settings)), quiet=True)
    rng = np.random.default_rng(0)
    run.log("started 2026-01-02 03:04:05: train_transformer.py --name a")
    run.log("torch 2.13.0, Python 3.11.7\ndemo: 9 training tokens\n12345 parameters | cpu | 1")
    for step in range(5, LAST + 1, 5):
        solved = step > BORDER
        values = {
            "forward_rel_residual": rng.uniform(1e-4, 5e-4),
            "forward_nfe": 6.0 + rng.random(),
            "backward_rel_residual": 1e-3,
            "backward_nfe": 7.0,
            "jac_loss": 1 / step,
        }
        run.log(f"step {step} | epoch 0 | lr 0.1 | 200 ms/step | 50 tok/s | loss 3.0")
        run.record(
            "train",
            step,
            loss=6 - step / 50,
            perplexity=400 - step,
            lr=0.1,
            tokens_per_s=50.0 + rng.random(),
            memory_mib=300.0,
            **values if solved else {},
        )
        if step % 20 == 0:
            phase = "equilibrium" if solved else "stacked"
            run.record(
                "valid",
                step,
                phase=phase,
                perplexity=401.23456 - step,
                loss=5.9,
                nfe=6.0,
                rel_residual=3e-4,
                abs_residual=0.1,
                sradius=0.875,
            )
    run.record("skipped", 60, loss=float("nan"), gradient_norm=1.0)
    run.record("diverged", 61, **DIVERGED)
    run.close()
    return folder


def ended(folder: Path) -> Path:
    """The same, finished."""
    end = {"kind": "final_test", "step": LAST, "loss": 4.321987, "tokens": 7, "nfe": 6.0}
    summary = {"kind": "summary", "step": LAST, "finished": True}
    with open(folder / METRICS, "a") as file:
        file.write(f"{json.dumps(end)}\n{json.dumps(summary)}\n")
    with open(folder / LOG, "a") as file:
        file.write("peak memory 321 MiB\n")
    return folder


def scenes(folder: Path) -> Path:
    run = Run(folder, ("config.yaml", "DATASET:\n  DATASET: digit_scenes\nSEED: 3\n"), quiet=True)
    run.record("train", 1, loss=1.0, accuracy=0.5, images_per_s=3.0)
    run.record("valid", 1, phase="stacked", loss=0.5, mIoU=0.625)
    run.close()
    return folder


def made(*folders, figures: int = 0) -> Page:
    """The page with its first ``figures`` figures, as drawing takes nearly all of the time."""
    runs = read_runs(list(folders))
    return Page(page(runs, charts(runs)[:figures]))


# ---- the page --------------------------------------------------------------------------------


def test_the_page_stands_alone(tmp_path, capsys):
    folder = ended(words(tmp_path / "run"))
    assert main([str(folder), "--png", str(tmp_path / "png")], "") == 0
    out = folder / "report.html"
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    assert len(text) < 1_000_000
    found = Page(text)
    assert "script" not in [tag for tag, _ in found.tags]
    for _, attributes in found.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text
    assert {"loss", "score-words", "forward-residual", "backward-residual", "evaluations",
            "jacobian", "radius", "speed", "memory", "rate", "troubles"} == {
        path.stem for path in (tmp_path / "png").glob("*.png")}  # fmt: skip
    assert len(found.images) == len(found.captions) == 11
    assert all(len(image["alt"]) > 10 for image in found.images)
    assert all(any(c.isdigit() for c in caption) for caption in found.captions)


def test_its_figures_are_those_of_the_records(tmp_path):
    folder = ended(words(tmp_path / "run"))
    found = made(folder, figures=3)
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    assert {401.23456 - LAST, 4.321987, train[-1]["loss"], train[-1]["forward_nfe"]} <= {
        *found.data
    }
    assert found.row("best perplexity, validation") == ["301.23"]
    assert found.row("test: loss") == ["4.322"]
    assert found.row("peak memory, MiB") == ["321"]
    assert found.row("training time, seconds") == ["20"]  # 100 steps of 200 ms
    assert found.row("skipped steps") == found.row("diverged solves") == ["1"]
    assert found.row("command") == ["train_transformer.py --name a"]
    assert found.row("software") == ["torch 2.13.0, Python 3.11.7"]
    assert found.row("data") == ["demo: 9 training tokens"]
    residuals = [r["forward_rel_residual"] for r in train if "forward_rel_residual" in r]
    (caption,) = (c for c in found.captions if c.startswith("Median") and "e-04" in c)
    assert f"Median {np.median(residuals):.2e}" in caption
    assert "of a moving window of 5 records" in caption
    for said in (
        *("finished after 100 steps", "301.23, at step 100 (equilibrium)", "75.34"),
        *("they converged", "1 step skipped, 1 solve diverged", "0.875, below 1"),
    ):
        assert said in found.text


def test_two_runs(tmp_path):
    """Curves in the same axes; the settings that differ, and no others; names that tell apart."""
    one, two = words(tmp_path / "a/run"), words(tmp_path / "b/run", lr=0.25)
    found = made(one, two, figures=1)
    assert found.rows.count(["setting", "a/run", "b/run"]) == 1
    assert ["lr", "0.1", "0.25"] in found.rows
    assert not any(row[0] == "dataset" and len(row) == 3 for row in found.rows)
    drawn = charts(read_runs([one, two]))
    assert len(drawn) == 11
    assert all("a/run: " in chart.caption and "b/run: " in chart.caption for chart in drawn)


def test_runs_of_other_kinds(tmp_path):
    found = made(words(tmp_path / "words"), scenes(tmp_path / "scenes"))
    assert found.row("best mean IoU, validation") == ["–", "62.50\N{NO-BREAK SPACE}%"]
    assert "All steps so far were stacked" in found.text


def test_an_audit_is_shown(tmp_path):
    folder = words(tmp_path / "run")
    audit = {"verdict": "cut short", "reason": "a < b", "advice": "state it", "measure": "loss",
             "cuts": [{"name": "2", "evaluations": 2.0, "measure": 3.25, "residual": None}, 7],
             "starts": "none", "radius": {"mean": 0.5}}  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(audit))
    found = made(folder)
    assert "Reason: a < b." in found.text
    assert found.row("2") == ["2", "3.25", "–", "–"]
    assert found.row("spectral radius") == ["0.5"]
    (folder / "audit.json").write_text("[]")
    assert main([str(folder)], "") == 2


def test_what_comes_from_a_run_is_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&"
    folder = words(tmp_path / "run<b>", note=evil, dataset=evil)
    (folder / "report.txt").write_text(evil)
    with open(folder / LOG, "a") as file:
        file.write(f"warning: {evil}\n")
    found = made(folder, figures=1)
    assert all(set(attributes) <= {"src", "alt"} for attributes in found.images)
    assert found.row("note") == [evil]
    assert found.text.count(evil) == 5  # the summary, two settings, the command's report, the log
    assert ("b", {}) not in found.tags


# ---- runs in any state -----------------------------------------------------------------------


def test_a_run_that_goes_on(tmp_path):
    folder = words(tmp_path / "run")
    with open(folder / METRICS, "a") as file:
        file.write('{"kind": "train", "st')
    found = made(folder)
    assert "at step 100 of 100: no end is recorded, so the run is going on" in found.text
    assert "1 line of metrics.jsonl could not be read" in found.text


@pytest.mark.parametrize("line", ["\x00" * 9, "[" * 100_000, '{"kind": "valid", "step": 3}'])
def test_a_damaged_line_costs_that_line_alone(tmp_path, line):
    folder = ended(words(tmp_path / "run"))
    whole = made(folder)
    first, *rest = (folder / METRICS).read_text().splitlines()
    (folder / METRICS).write_text("\n".join([first, line, *rest, ""]))
    found = made(folder)
    assert "1 line of metrics.jsonl could not be read" in found.text
    assert found.data == whole.data


@pytest.mark.parametrize("value", [None, "7", 1e308])
def test_a_value_that_is_no_number(tmp_path, value):
    folder = words(tmp_path / "run")
    keys = ("loss", "perplexity", "forward_rel_residual", "forward_nfe", "lr", "sradius", "nfe")
    odd = dict.fromkeys(keys, value)
    lines = [{"kind": "train", "step": LAST + 1, **odd},
             {"kind": "valid", "step": LAST + 1, "phase": "equilibrium", **odd}]  # fmt: skip
    with open(folder / METRICS, "a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    assert made(folder, figures=4).row("best perplexity, validation") == ["301.23"]


def test_numbers_of_any_size(tmp_path):
    folder = words(tmp_path / "run")
    with open(folder / METRICS, "a") as file:
        file.write(f'{{"kind": "train", "step": 1{"0" * 400}, "loss": 1.0}}\n')
        file.write(f'{{"kind": "train", "step": 100, "loss": 1{"0" * 400}}}\n')
    (folder / "audit.json").write_text(f'{{"verdict": "odd", "radius": {{"mean": 1{"0" * 400}}}}}')
    found = made(folder)
    assert found.row("last step") == ["100"]
    assert found.row("spectral radius") == ["0.875"]


def test_names_that_drawing_could_take_for_markup(tmp_path):
    names = "_first", "of $\\frac{1}{$"
    runs = read_runs([words(tmp_path / name) for name in names])
    _, svg = charts(runs)[0].svg().split(",")
    text = base64.b64decode(svg).decode()
    assert all(f">{' ' * (name[0] == '_')}{name}</text>" in text for name in names)


@pytest.mark.filterwarnings("error")  # matplotlib warns when the axes have no room
def test_thirty_runs_have_room(tmp_path):
    runs = read_runs([scenes(tmp_path / f"{'long ' * 20}{i}") for i in range(30)])
    loss = charts(runs)[0]
    assert loss.png()
    assert loss._figure().get_figheight() > 4


def test_all_that_is_drawn_is_inside_the_axes(tmp_path):
    """Also values far from zero and close to each other, and the first of a falling line."""
    for chart in charts(read_runs([words(tmp_path / "run")])):
        axes = chart._figure().axes[0]
        low, high = axes.get_ylim()
        assert low <= axes.dataLim.y0, chart.key
        assert axes.dataLim.y1 <= low + 0.99 * (high - low), chart.key


@pytest.mark.parametrize("count", [0, 1])
def test_few_records(tmp_path, count):
    folder = words(tmp_path / "run")
    lines = (folder / METRICS).read_text().splitlines()[:count]
    (folder / METRICS).write_text("".join(f"{line}\n" for line in lines))
    found = made(folder, figures=9)
    assert ("There is no record yet: " in found.text) == (count == 0)
    assert ("No validation yet." in found.text) == (count == 1)


def test_state_tracking(tmp_path):
    run = Run(tmp_path, ("settings.json", '{"dataset": "state:S3"}'), quiet=True)
    for step, loss, exact in ((10, 0.5, 0.25), (20, 0.25, 0.75)):
        run.record("valid", step, phase="stacked", length=32, loss=loss, exact=exact, nfe=0.0)
    for length in (32, 64):
        run.record(f"final_test_{length}", 20, length=length, exact=length / 128)
    run.close()
    found = made(tmp_path)
    assert found.row("best strings with all answers right, validation") == [
        "75.00\N{NO-BREAK SPACE}%"
    ]
    assert found.row("test 64: all answers right") == ["0.5"]


# ---- the command -----------------------------------------------------------------------------


def test_refusals(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = words(tmp_path / "run")
    (scenes(tmp_path / "empty") / "config.yaml").write_text("")
    for argv, said in (
        ([tmp_path / "empty"], "config.yaml holds no settings of a run"),
        ([tmp_path / "nowhere"], "holds no training run"),
        ([folder, folder], "stands twice"),
        ([folder, "--out", folder / LOG], "is no report"),
    ):
        assert main([*map(str, argv)], "") == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert "started" in (folder / LOG).read_text()


def test_several_runs_have_their_page_here(tmp_path, monkeypatch, capsys):
    """A page of before is replaced."""
    monkeypatch.chdir(tmp_path)
    one, two = scenes(tmp_path / "a"), scenes(tmp_path / "b")
    Path("report.html").write_text(MARK)
    assert main([str(one), str(two)], report.__doc__.split("\n\n")[0]) == 0
    assert "report.html" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report.html"]
