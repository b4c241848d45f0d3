"""The documentation site builds without warnings, and its links lead somewhere."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import check_links
import lib

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None,
    reason="Sphinx is not installed: pip install -r requirements-docs.txt",
)
def test_the_site(tmp_path, capsys):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    folders = ["-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "html")]
    build = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert check_links.main([str(tmp_path / "html")]) == 0, capsys.readouterr().err


def test_the_api_lists_every_public_name():
    page = (ROOT / "docs/api/lib.md").read_text(encoding="utf-8")
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("   lib.")}
    assert listed == set(lib.__all__)


def test_broken_links_are_named(tmp_path, capsys):
    (tmp_path / "there.html").write_text('<h1 id="top"></h1>')
    good = '<a href="there.html#top"></a><a href="https://example.org/"></a><a href="#here"></a>'
    page = tmp_path / "index.html"
    page.write_text(f'<p id="here">{good}</p>')
    assert check_links.main([str(tmp_path)]) == 0
    assert "3 links" not in capsys.readouterr().out  # the other host's is not within the site
    bad = {
        "gone.html": "leads to no file",
        "there.html#bottom": "leads to no such anchor",
        "#nowhere": "leads to no such anchor",
        "../../secret": "leads out of the site",
        "http://": "is not a web address",
    }
    page.write_text("".join(f'<a href="{link}"></a>' for link in bad))
    assert check_links.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"index.html: {link} {problem}" for link, problem in bad.items()]


def test_the_folder_must_exist(tmp_path, capsys):
    assert check_links.main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
