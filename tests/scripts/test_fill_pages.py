"""The tables and figures of the pages are those of the files in docs/data."""

from pathlib import Path

import fill_pages
import pytest

from lib.errors import InputError

DOCS = Path(__file__).resolve().parents[2] / "docs"
AGAIN = "call scripts/benchmarks/fill_pages.py and commit what it writes"


def test_the_tables_are_those_of_the_data():
    for name, text in fill_pages.pages(DOCS).items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"{name}: {AGAIN}"


def test_the_figures_are_those_of_the_data(tmp_path):
    fill_pages.figures(DOCS, tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 3
    for path in drawn:
        assert (DOCS / "figures" / path.name).read_bytes() == path.read_bytes(), AGAIN


def test_a_block_is_replaced_and_the_rest_kept():
    page = "a\n<!-- t: begin -->\nold\n<!-- t: end -->\nb\n"
    filled = fill_pages.fill(page, "t", "new")
    assert filled == "a\n<!-- t: begin -->\n\nnew\n\n<!-- t: end -->\nb\n"
    assert fill_pages.fill(filled, "t", "new") == filled
    with pytest.raises(InputError, match="once each"):
        fill_pages.fill(page, "u", "new")
