"""The command: read the runs, write the page, and PNGs if asked."""

from pathlib import Path

from lib.errors import InputError
from lib.runs.atomic_files import atomic_write
from lib.runs.command_line import Parser, exit_code
from run_report.charts import charts
from run_report.page import MARK, page
from run_report.reading import read_runs

NAME = "report.html"


def main(argv: list[str] | None, description: str) -> int:
    """Run the command; return its exit code."""
    return exit_code("report.py", lambda: _run(argv, description))


def _run(argv: list[str] | None, description: str) -> None:
    parser = Parser(prog="report.py", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"where to write the page (one run: {NAME} in its folder; several: ./{NAME})",
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write each figure there as a PNG"
    )
    args = parser.parse_args(argv)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / NAME
    runs = read_runs(args.runs)
    # Only a page of this command is replaced: a wrong name must not cost a run's file.
    if out.exists() and (not out.is_file() or MARK not in out.read_text("utf-8", "replace")):
        raise InputError(f"--out: {out} is there and is no report: give another name")
    found = charts(runs)
    text = page(runs, found).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(text)
    print(f"{out} ({len(text) / 1000:,.0f} kB)")
    if args.png is not None:
        args.png.mkdir(parents=True, exist_ok=True)
        for chart in found:
            with atomic_write(args.png / f"{chart.key}.png") as file:
                file.write(chart.png())
        print(f"{len(found)} figures in {args.png}")
