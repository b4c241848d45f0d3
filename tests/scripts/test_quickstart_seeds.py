"""quickstart_seeds.py on tiny sizes: what it trains, what it keeps, and its table."""

import json
import re

import pytest
import quickstart_seeds

from lib.runs.run_folder import read_metrics
from small_digits import SMALL
from small_runs import TINY_DIGITS
from test_readme import TINY_WORDS


@pytest.fixture
def command(tmp_path, demo_folder, monkeypatch):
    """Run the command in this process; its exit code and what it trained."""
    words = [*TINY_WORDS, "--data", str(demo_folder)]
    digits = [*TINY_DIGITS, *SMALL]
    extra = {"words": words, "digits": digits, "digits-stacked": digits}
    monkeypatch.setattr(quickstart_seeds, "EXTRA", extra)
    trained = []

    def here(function, *arguments):
        trained.append(arguments[:2])
        function(*arguments)

    monkeypatch.setattr(quickstart_seeds, "in_new_process", here)

    def run(*argv):
        trained.clear()
        code = quickstart_seeds.main(["--out", str(tmp_path / "seeds"), *argv])
        return code, list(trained)

    return run


def test_the_command(command, tmp_path, capsys):
    assert command("--only", "words", "digits", "--seeds", "1") == (
        0,
        [("words", 1), ("digits", 1)],
    )
    assert "| perplexity (best, test)" in capsys.readouterr().out
    file = tmp_path / "seeds.json"
    flags = ["--only", "digits", "--seeds", "1", "2", "2", "--json", str(file)]
    assert command(*flags) == (0, [("digits", 2)])
    runs = json.loads(file.read_text())["runs"]
    assert [(run["model"], run["seed"]) for run in runs] == [("digits", 1), ("digits", 2)]
    for run in runs:
        folder = tmp_path / f"seeds/seed-{run['seed']}/digits/cls_mdeq_TINY"
        tested = {r["weights"]: r for r in read_metrics(folder) if r["kind"] == "final_test"}
        assert {w: run[f"{w}, test"] for w in tested} == {w: r["top1"] for w, r in tested.items()}
    mean = (runs[0]["best, test"] + runs[1]["best, test"]) / 2
    (row,) = (x for x in capsys.readouterr().out.splitlines() if "top1 (best, test)" in x)
    assert row.split("|")[3].strip() == f"{mean:.4g}"


def test_bad_flags(command, capsys):
    assert command("--only", "sentences") == (2, [])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stack_throughout(command, tmp_path, capsys):
    both = ["digits", "digits-stacked"]
    assert command("--only", *both, "--seeds", "1") == (0, [(name, 1) for name in both])
    evaluations = []
    for folder in (tmp_path / "seeds", tmp_path / "seeds/stacked"):
        records = read_metrics(folder / "seed-1/digits/cls_mdeq_TINY")
        evaluations.append([r["nfe"] for r in records if r["kind"] == "final_test"])
        assert records[-1]["finished"]
    assert min(evaluations[0]) > 0
    assert set(evaluations[1]) == {0}
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| digits")]
    names = [re.search(r"\((.*?)\)", row)[1] for row in rows]
    assert names.count("stacked, valid") == 1
