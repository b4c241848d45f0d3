"""The page: one HTML file with its style and figures inside, for light and dark, wide and narrow.

All that comes from a run is escaped. The page has no script and no address of another file.
"""

import base64
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from run_report.drawing import Chart, look
from run_report.reading import COMMANDS_REPORT, PICTURES, TrainingRun
from run_report.saying import as_text, differing_settings, final_figures, number, summary

MARK = '<meta name="generator" content="scripts/report.py">'  # a page of this command
_MOST_ROWS = 40  # of differing settings; more are folded
_LARGEST_PICTURE = 1_000_000  # bytes
_STYLE = Path(__file__).with_name("style.css")


def page(runs: Sequence[TrainingRun], charts: Sequence[Chart]) -> str:
    """The report of the runs as HTML."""
    title = "Report: " + ", ".join(run.name for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Made on {time.strftime("%Y-%m-%d %H:%M:%S")} by scripts/report.py.</p>',
        *(_summary(run, look(i)["color"] if len(runs) > 1 else "") for i, run in enumerate(runs)),
        *_section("Figures", _charts(charts)),
        *_section("Final figures", _figures(runs)),
    ]
    if len(runs) > 1:
        parts += _section("Settings that differ", _differences(runs))
    parts += _section("Pictures", "".join(map(_pictures, runs)))
    parts += _section("Audit", "".join(_audit(run) for run in runs if run.audit))
    parts += _section("What the training command printed at its end", "".join(map(_own, runs)))
    parts += _section("Environment", _environment(runs))
    parts += _section("Warnings, starts and stops", "".join(map(_notes, runs)))
    parts += _section("Settings", "".join(map(_settings, runs)))
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Browsers ask for an icon unless they are told that there is none.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", content] if content else []


def _summary(run: TrainingRun, colour: str) -> str:
    first, *others = map(escape, summary(run))
    dot = f'<span class="dot" style="background:{colour}"></span>' if colour else ""
    rest = f"<p>{' '.join(others)}</p>" if others else ""
    return (
        f'<section class="card"><h3>{dot}{escape(run.name)}</h3><p><strong>{first}</strong></p>'
        f"{rest}</section>"
    )


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return "<p>There is no record yet, so there is nothing to draw.</p>"
    return '<div class="figures">' + "\n".join(map(_chart, charts)) + "</div>"


def _chart(chart: Chart) -> str:
    return (
        f'<figure id="{escape(chart.key)}"><h3>{escape(chart.title)}</h3>'
        f'<img src="{chart.svg()}" alt="{escape(chart.alt)}">'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _table(
    head: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]], numbers: bool = False
) -> str:
    """A table of cells that are HTML already; a row begins with its name."""
    side = ' class="n"' if numbers else ""
    first, *others = head
    top = f'<th scope="col">{first}</th>' + "".join(
        f'<th scope="col"{side}>{name}</th>' for name in others
    )
    lines = [
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td{side}>{c}</td>" for c in cells) + "</tr>"
        for name, cells in rows
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _names(runs: Sequence[TrainingRun]) -> list[str]:
    return [escape(run.name) for run in runs]


def _figures(runs: Sequence[TrainingRun]) -> str:
    rows = [
        (
            escape(name),
            [
                f'<data value="{value!r}">{escape(text)}</data>' if math.isfinite(value) else text
                for text, value in cells
            ],
        )
        for name, cells in final_figures(runs)
    ]
    return _table(["", *_names(runs)], rows, numbers=True) if rows else ""


def _differences(runs: Sequence[TrainingRun]) -> str:
    rows = [(escape(n), list(map(escape, values))) for n, values in differing_settings(runs)]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    table = _table(["setting", *_names(runs)], rows)
    if len(rows) <= _MOST_ROWS:
        return table
    return f"<details><summary>{len(rows)} settings differ</summary>{table}</details>"


def _environment(runs: Sequence[TrainingRun]) -> str:
    found = [run.environment for run in runs]
    names = dict.fromkeys(name for own in found for name in own)
    rows = [(escape(n), [escape(own.get(n, "–")) for own in found]) for n in names]
    rows.append(("folder", [escape(str(run.folder)) for run in runs]))
    return _table(["", *_names(runs)], rows)


def _settings(run: TrainingRun) -> str:
    if not run.settings:
        return f"<p>{escape(run.name)} has no file of settings.</p>"
    rows = [(escape(str(k)), [escape(as_text(v))]) for k, v in run.settings.items()]
    return (
        f"<details><summary>{escape(run.name)}: {len(rows)} settings</summary>"
        f"{_table(['setting', 'value'], rows)}</details>"
    )


def _notes(run: TrainingRun) -> str:
    if not run.notes:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in run.notes)
    return f"<h3>{escape(run.name)}</h3><ul>{lines}</ul>"


def _own(run: TrainingRun) -> str:
    if not run.own_report:
        return ""
    return (
        f"<details><summary>{escape(run.name)}: {COMMANDS_REPORT}</summary>"
        f"<pre>{escape(run.own_report)}</pre></details>"
    )


def _pictures(run: TrainingRun) -> str:
    found = []
    for name in PICTURES:
        path = run.folder / name
        if path.is_file() and path.stat().st_size <= _LARGEST_PICTURE:
            data = base64.b64encode(path.read_bytes()).decode()
            said = f"{run.name}: {name}, predictions that the training command drew at its end"
            found.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{escape(said)}" '
                f'style="max-width:60rem"><figcaption>{escape(said)}.</figcaption></figure>'
            )
    return "".join(found)


def _audit(run: TrainingRun) -> str:
    """Verdict, reason, and the first two findings as tables; of a damaged part, what is there."""
    audit = run.audit
    said = [f"<h3>{escape(run.name)}: {escape(audit['verdict'])}</h3>"]
    for name in ("reason", "advice"):
        if isinstance(audit.get(name), str):
            said.append(f"<p>{name.capitalize()}: {escape(audit[name])}.</p>")
    measure = str(audit.get("measure", "measure"))
    keys = ("evaluations", "measure", "residual", "settled")
    cuts = [
        (escape(str(cut.get("name"))), [_cell(cut.get(key)) for key in keys])
        for cut in _dicts(audit.get("cuts"))
    ]
    if cuts:
        head = ["the solve ends", "evaluations", escape(measure), "residual", "settled (share)"]
        said.append(_table(head, cuts, numbers=True))
    keys = ("settled", "distance", "elsewhere", "change")
    starts = [
        (
            escape(f"{s.get('kind')}, scale {as_text(s.get('scale'))}"),
            [_cell(s.get(key)) for key in keys],
        )
        for s in _dicts(audit.get("starts"))
    ]
    if starts:
        head = ["other starts", "settled (share)", "distance", "elsewhere (share)", "change"]
        said.append(_table(head, starts, numbers=True))
    for key, title in (("correctness", "Residual and correctness"),
                       ("effort", "Evaluations and difficulty")):  # fmt: skip
        part = audit.get(key)
        if isinstance(part, dict) and isinstance(part.get("said"), str):
            said.append(f"<p>{title}: {escape(part['said'])}.</p>")
    return "".join(said)


def _dicts(found) -> list[dict]:
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _cell(value) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return f'<data value="{value!r}">{number(value)}</data>'
    return "–"
