"""Write the tables and figures of the pages from the files in docs/data.

    python scripts/benchmarks/fill_pages.py

A file in docs/data is either a result that a benchmark wrote (--json), or what a command printed
(.txt). To show a new result, replace the file and call this command. A table stands between two
comments in its page, <!-- NAME: begin --> and <!-- NAME: end -->.
"""

import json
import sys
from pathlib import Path

import bench_audits
import bench_film
import bench_generation
import bench_graph
import bench_quality
import bench_sample_stop
import bench_states
import bench_steps
import bench_words
import bench_words_start
import compare_gradients
import compare_ties
import gpu_rates
import quickstart_seeds
from helpers import comparison_figures, maze_tables, prefix_sums_tables
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


def of_states(found: dict) -> dict[str, str]:
    return {"state tracking": f"    {found['machine']}\n\n{bench_states.report(found)}"}


def of_words(found: dict) -> dict[str, str]:
    return {"words": f"    {found['machine']}\n\n{bench_words.report(found)}"}


def of_quickstart(found: dict) -> dict[str, str]:
    body = quickstart_seeds.report(found["runs"])
    return {"quickstart": f"    {found['machine']}\n\n{body}"}


def of_audits(found: dict) -> dict[str, str]:
    text = f"    {found['machine']}\n\n{bench_audits.report(found)}"
    return {"audits": text, "audits, correctness": bench_audits.findings(found)}


def of_gpu_rates(found: dict) -> dict[str, str]:
    body = table(gpu_rates.HEAD, gpu_rates.rows(found))
    text = f"    {found['machine']}\n\n{body}\n\n{gpu_rates.notes(found)}"
    return {"gpu rates": text}


def of_graph(found: dict) -> dict[str, str]:
    head, rows = bench_graph.step_times(found["settings"])
    return {"graphs": f"    {found['machine']}\n\n{table(head, rows)}"}


def of_planner(found: dict) -> dict[str, str]:
    return {"planner": table(found["table"]["head"], found["table"]["rows"])}


def of_words_start(found: dict) -> dict[str, str]:
    return {"words, start": f"    {found['machine']}\n\n{bench_words_start.report(found)}"}


def of_generation(found: dict) -> dict[str, str]:
    rows = found["ways"]
    head = f"{found['machine']} | {found['tokens']} tokens, {len(rows[0]['seconds'])} rounds"
    return {"generation": f"    {head}\n\n{bench_generation.report(rows)}"}


def of_film(found: dict) -> dict[str, str]:
    return {"film": bench_film.report(found)}


def of_sample_stop(found: dict) -> dict[str, str]:
    return {"sample stop": bench_sample_stop.report(found)}


def of_steps(found: dict) -> dict[str, str]:
    return {"steps": f"    {found['machine']}\n\n{bench_steps.report(found)}"}


def of_quality(found: dict) -> dict[str, str]:
    return {"time to quality": f"    {found['machine']}\n\n{bench_quality.report(found)}"}


# Files of figures: the page that shows each, and what makes the text of its blocks, by name.
FIGURES = {
    "gradients.json": ("gradients.md", of_gradients),  # compare_gradients.py
    "ties.json": ("benchmarks.md", of_ties),  # compare_ties.py
    "time_to_quality.json": ("benchmarks.md", of_quality),  # bench_quality.py
    "own_layer.json": ("own-layer.md", of_own_layer),  # bench_own_layer.py
    # examples/prefix_sums_compared.py, mazes.py and maze_ablations.py
    "prefix_sums.json": ("larger-problems.md", prefix_sums_tables.blocks),
    "mazes.json": ("larger-problems.md", maze_tables.blocks),
    "maze_ablations.json": ("larger-problems.md", maze_tables.ablations),
    "state_tracking.json": ("larger-problems.md", of_states),  # bench_states.py
    "words.json": ("words.md", of_words),  # bench_words.py
    "words_start.json": ("words.md", of_words_start),  # bench_words_start.py
    "generation.json": ("words.md", of_generation),  # bench_generation.py
    "quickstart_seeds.json": ("start.md", of_quickstart),  # quickstart_seeds.py
    "film.json": ("images.md", of_film),  # bench_film.py
    "sample_stop.json": ("benchmarks.md", of_sample_stop),  # bench_sample_stop.py
    "audits.json": ("larger-problems.md", of_audits),  # bench_audits.py
    "gpu_rates.json": ("planning.md", of_gpu_rates),  # gpu_rates.py
    "steps.json": ("benchmarks.md", of_steps),  # bench_steps.py
    "graph.json": ("choosing.md", of_graph),  # bench_graph.py
    "planner_check.json": ("planning.md", of_planner),  # scripts/plan_training.py --check
}
# Files of printed text: the page that shows each. The block has the name of the file.
PRINTED = {
    "bench_adjoints.txt": "benchmarks.md",
    "bench_gradients.txt": "benchmarks.md",
    "bench_roots.txt": "benchmarks.md",
    "gpu_check_steps.txt": "benchmarks.md",
}


def pages(docs: Path) -> dict[str, str]:
    """Return the filled text of each page whose data are there."""
    filled: dict[str, str] = {}
    for file in sorted((docs / "data").iterdir()):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            page, blocks = PRINTED[file.name], {file.stem: text.strip("\n")}
        else:
            page, make = FIGURES[file.name]
            blocks = make(json.loads(text))
        for name, body in blocks.items():
            before = filled.get(page) or (docs / page).read_text(encoding="utf-8")
            filled[page] = fill(before, name, body)
    return filled


def figures(docs: Path, folder: Path) -> None:
    """Draw the figures into ``folder``."""
    drawings = {"gradients.json": comparison_figures.draw, "mazes.json": maze_tables.draw}
    for name, draw in drawings.items():
        draw(json.loads((docs / "data" / name).read_text(encoding="utf-8")), folder)


def main() -> int:
    for name, text in pages(DOCS).items():
        (DOCS / name).write_text(text, encoding="utf-8")
    figures(DOCS, DOCS / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
