"""Write the tables and figures of the pages from the files of the comparisons.

    python scripts/benchmarks/fill_pages.py

docs/data/gradients.json is a result of compare_gradients.py, docs/data/ties.json of
compare_ties.py. To show a new result, copy its file there and call this command. A table stands
between two comments in its page, <!-- NAME: begin --> and <!-- NAME: end -->.
"""

import json
import sys
from pathlib import Path

import compare_gradients
import compare_ties
from helpers import comparison_figures
from helpers.comparison import TASKS

from lib.errors import InputError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(data: Path) -> dict[str, dict[str, str]]:
    """Return the text of each block by page and name."""
    gradients = json.loads((data / "gradients.json").read_text(encoding="utf-8"))
    ties = json.loads((data / "ties.json").read_text(encoding="utf-8"))
    tables = {
        f"gradients, {task}": compare_gradients.task_report(gradients, task) for task in TASKS
    }
    machine = f"{gradients['machine']}; {gradients['minutes']:.0f} minutes in all"
    return {
        "gradients.md": {"gradients, machine": f"    {machine}", **tables},
        "benchmarks.md": {"ties": f"    {ties['machine']}\n\n{compare_ties.means(ties)}"},
    }


def fill(page: str, name: str, body: str) -> str:
    """Return the page with ``body`` between the two comments of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise InputError(f"a page needs the two lines {begin!r} and {end!r}, once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"


def pages(docs: Path) -> dict[str, str]:
    """Return the filled text of each page."""
    filled = {}
    for name, parts in blocks(docs / "data").items():
        text = (docs / name).read_text(encoding="utf-8")
        for block, body in parts.items():
            text = fill(text, block, body)
        filled[name] = text
    return filled


def figures(docs: Path, folder: Path) -> None:
    """Draw the figures into ``folder``."""
    found = json.loads((docs / "data/gradients.json").read_text(encoding="utf-8"))
    comparison_figures.draw(found, folder)


def main() -> int:
    for name, text in pages(DOCS).items():
        (DOCS / name).write_text(text, encoding="utf-8")
    figures(DOCS, DOCS / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
