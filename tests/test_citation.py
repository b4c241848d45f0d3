"""CITATION.cff can be read by machines, and names the software and the three papers."""

import re
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {"1909.01377", "2006.08656", "2106.14342"}


def test_citation_names_the_software_and_its_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited.keys() >= {"message", "title", "authors"}  # required by the format
    assert str(cited["version"]) == version("deep-equilibrium-models")
    for paper in cited["references"]:
        assert paper.keys() >= {"type", "title", "authors", "year"}
        (identifier,) = paper["identifiers"]
        assert paper["url"].endswith(identifier["value"].removeprefix("arXiv:"))
    assert {paper["url"].rsplit("/", 1)[1] for paper in cited["references"]} == PAPERS


def test_readme_cites_the_same_papers():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", readme)) >= PAPERS
    assert "CITATION.cff" in readme
