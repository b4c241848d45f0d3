"""Write the tables and figures of the pages from the files of the comparisons.

    python scripts/benchmarks/fill_pages.py

In docs/data, gradients.json is a result of compare_gradients.py, ties.json of compare_ties.py and
own_layer.json of bench_own_layer.py. To show a new result, copy its file there and call this
command. A table stands between two comments in its page, <!-- NAME: begin --> and
<!-- NAME: end -->.
"""

import json
import sys
from pathlib import Path

import compare_gradients
import compare_ties
from helpers import comparison_figures
from helpers.comparison import TASKS
from helpers.measure import fill, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def of_gradients(found: dict) -> dict[str, str]:
    tables = {f"gradients, {task}": compare_gradients.task_report(found, task) for task in TASKS}
    machine = f"    {found['machine']}; {found['minutes']:.0f} minutes in all"
    return {"gradients, machine": machine, **tables}


def of_ties(found: dict) -> dict[str, str]:
    return {"ties": f"    {found['machine']}\n\n{compare_ties.means(found)}"}


def of_own_layer(found: dict) -> dict[str, str]:
    body = table(found["table"]["head"], found["table"]["rows"])
    return {"own layer": f"    {found['machine']}\n\n{body}"}


# The file of data, the page that shows it, and what makes the text of each block by its name.
SHOWN = {
    "gradients.json": ("gradients.md", of_gradients),
    "ties.json": ("benchmarks.md", of_ties),
    "own_layer.json": ("own-layer.md", of_own_layer),
}


def pages(docs: Path) -> dict[str, str]:
    """Return the filled text of each page whose data are there."""
    filled = {}
    for file in sorted((docs / "data").glob("*.json")):
        page, blocks = SHOWN[file.name]
        text = (docs / page).read_text(encoding="utf-8")
        for name, body in blocks(json.loads(file.read_text(encoding="utf-8"))).items():
            text = fill(text, name, body)
        filled[page] = text
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
