"""bench_start.py on starts that take a moment: the tables, the end at a line, bad input."""

import json
from pathlib import Path

import bench_start
import pytest
from bench_start import ROOT, TORCH, Case, all_cases, import_times, start

QUICK = {
    TORCH: Case(["-c", "import json"]),
    "more": Case(["-c", "import json, csv, lib.errors as e; print(e.__file__)"]),
}


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Light modules for heavy ones; ``lib`` is a folder without torch."""
    (tmp_path / "lib").mkdir()
    for name in ("__init__", "errors"):
        (tmp_path / "lib" / f"{name}.py").touch()
    monkeypatch.setattr(bench_start, "all_cases", lambda scratch: QUICK)
    monkeypatch.setattr(bench_start, "extracted", lambda ref, folder: tmp_path)
    monkeypatch.setattr(bench_start, "ROOT", tmp_path)


def test_the_tables(few, tmp_path, capsys):
    flags = ["--rounds", "1", "--against", "main", "--json", str(tmp_path / "found.json")]
    assert bench_start.main(flags) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["here", "main"]
    for rows in found.values():
        assert list(rows) == list(QUICK)
        assert all(0 < row["cpu"] < 5 and row["wall"] > 0 for row in rows.values())
        assert {"csv", "lib"} <= rows["more"]["imports"].keys()  # and not json, as in the first
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| more")]
    assert [line.count("|") for line in lines] == [6, 7]  # the second with a ratio


def test_unknown_names(few, capsys):
    assert bench_start.main(["--cases", "mor"]) == 2
    assert "unknown 'mor': did you mean more?" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_files_of_a_commit(tmp_path):
    folder = bench_start.extracted("HEAD", tmp_path / "other")
    assert (folder / "lib/__init__.py").is_file()
    with pytest.raises(ValueError, match="git knows no commit no-such"):
        bench_start.extracted("no-such", tmp_path)


def test_a_start_ends_at_its_line(tmp_path):
    code = "import time; print('loading'); print('step 1 | loss', flush=True); time.sleep(600)"
    cost, _ = start(Case(["-c", code], "step 1 "), tmp_path)
    assert 0 < cost.cpu <= cost.wall < 60
    with pytest.raises(ValueError, match="did not start: exit code 0"):
        start(Case(["-c", "print('step 2')"], "step 1 "), tmp_path)
    with pytest.raises(ValueError, match="did not start: ZeroDivisionError"):
        import_times(Case(["-c", "1 / 0"]), tmp_path)


def test_the_scripts_of_the_cases_exist():
    words = [word for case in all_cases(Path("x")).values() for word in case.words]
    scripts = [word for word in words if word.endswith(".py")]
    assert len(scripts) == 6
    assert all(Path(s.replace("{root}", str(ROOT))).is_file() for s in scripts)
