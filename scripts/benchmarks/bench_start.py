"""Seconds until something starts: imports, --help, and a first training step.

    python scripts/benchmarks/bench_start.py
    python scripts/benchmarks/bench_start.py --against main    # beside another commit
    python scripts/benchmarks/bench_start.py --cases "import lib" "audit.py --help"

Every start is a new process of one thread; the cases take turns. "CPU s" is a median, and "beyond
torch" is what it has more than `import torch` alone. "wall s" depends on what else the machine
does. A first step ends with the first training step's line in the log. The last column names the
packages with the longest imports beyond those of `import torch`.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_turns, table

from deq_sequence.text.corpus import get_lm_corpus
from lib.errors import InputError, did_you_mean
from lib.runs.command_line import exit_code

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (".", "DEQ-Sequence", "MDEQ-Vision")  # whose packages an editable install finds
TORCH = "import torch"
HEAD = ["start", "CPU s", "beyond torch", "wall s", "of it (s)"]


class Case(NamedTuple):
    """Words after ``python``; ``until`` begins the line of output after which it is ended."""

    words: list[str]
    until: str = ""


class Cost(NamedTuple):
    """Seconds of one start."""

    cpu: float
    wall: float


def all_cases(scratch: Path) -> dict[str, Case]:
    """By name; ``{root}`` stands for the checkout. Runs and data lie in ``scratch``."""
    cases = {TORCH: Case(["-c", TORCH])}
    for module in ("lib.solvers", "lib", "deq_sequence", "mdeq_vision"):
        cases[f"import {module}"] = Case(["-c", f"import {module}"])
    for script in (
        *("DEQ-Sequence/train_transformer.py", "MDEQ-Vision/tools/cls_train.py"),
        *("scripts/export_weights.py", "scripts/audit.py"),
    ):
        cases[f"{Path(script).name} --help"] = Case([f"{{root}}/{script}", "--help"])
    words = f"--data {scratch / 'demo'} --debug --max_step 1 --log-interval 1".split()
    words = ["{root}/DEQ-Sequence/quickstart.py", *words]
    cases["quickstart, words: first step"] = Case(words, "step 1 ")
    images = "DEBUG.DEBUG True PRINT_FREQ 1 WORKERS 0".split()
    images = ["{root}/MDEQ-Vision/quickstart.py", "digits", *images]
    cases["quickstart, digits: first step"] = Case(images, "epoch 0 [1/")
    return cases


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_start.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> dict:
    """Measure and print; return the figures by checkout and case."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cases = _chosen(args.cases, all_cases(scratch))
        if any("--data" in case.words for case in cases.values()):
            get_lm_corpus(scratch / "demo", "demo")
        checkouts = {"here": ROOT}
        if args.against:
            checkouts[args.against] = extracted(args.against, scratch / "other")
        print(describe_machine(torch.device("cpu")), flush=True)
        found = measure(cases, checkouts, args.rounds)
    print(report(found))
    write_json(args.json, found)
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bench_start.py", description=__doc__.split("\n\n")[0], least={"rounds": 1}
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts of each case")
    parser.add_argument("--against", metavar="REF", help="a commit or branch to compare with")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="names in the table; all")
    return parser.parse_args(argv)


def _chosen(names: list[str] | None, cases: dict[str, Case]) -> dict[str, Case]:
    """The cases of these names, and bare torch, with which all are compared."""
    for name in names or ():
        if name not in cases:
            hint = did_you_mean(name, cases, otherwise=f": choose from {', '.join(cases)}")
            raise InputError(f"--cases: unknown {name!r}{hint}")
    return {n: c for n, c in cases.items() if n == TORCH or not names or n in names}


def extracted(ref: str, folder: Path) -> Path:
    """The files of a commit, in ``folder``."""
    done = subprocess.run(["git", "archive", ref], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise InputError(f"--against: git knows no commit {ref}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def measure(cases: dict[str, Case], checkouts: dict[str, Path], rounds: int) -> dict:
    """Figures of each case in each checkout; a first start of all compiles the modules."""
    jobs = {f"{place}\n{name}": (cases[name], checkouts[place])
            for place in checkouts for name in cases}  # fmt: skip
    costs: dict[str, list[Cost]] = {key: [] for key in jobs}
    imports = {key: import_times(*job) for key, job in jobs.items()}
    for _, key in in_turns(jobs, rounds):
        costs[key].append(start(*jobs[key])[0])
    found: dict = {place: {} for place in checkouts}
    for key, own in costs.items():
        place, name = key.split("\n")
        bare = imports[f"{place}\n{TORCH}"].keys() if name != TORCH else ()
        packages = Counter()
        for module, seconds in imports[key].items():
            if module not in bare:
                packages[package_of(module)] += seconds
        found[place][name] = {
            "cpu": statistics.median(cost.cpu for cost in own),
            "wall": statistics.median(cost.wall for cost in own),
            "imports": dict(packages.most_common(4)),
        }
    return found


def start(case: Case, checkout: Path, *flags: str) -> tuple[Cost, str]:
    """Start a case, wait for its end or its line, and return the cost and the error stream."""
    words = [word.replace("{root}", str(checkout)) for word in case.words]
    path = os.pathsep.join(str(checkout / room) for room in ROOMS)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    began, reached = time.perf_counter(), not case.until
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, *flags, *words],
            env=environment,
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process.stdout:
            for line in process.stdout:
                if case.until and case.until in line:
                    reached = True
                    process.send_signal(signal.SIGKILL)
                    break
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        errors.seek(0)
        said = errors.read().decode()
    if not reached or process.returncode not in (0, -signal.SIGKILL):
        last = said.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise InputError(f"{' '.join(words)} in {checkout} did not start: {last[0]}")
    return Cost(used.ru_utime + used.ru_stime, wall), said


def import_times(case: Case, checkout: Path) -> dict[str, float]:
    """Seconds of each module's own import."""
    said = start(case, checkout, "-X", "importtime")[1]
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| *(\S+)$", said, flags=re.MULTILINE)
    return {module: int(microseconds) / 1e6 for microseconds, module in rows}


def package_of(module: str) -> str:
    """The package that a table names: of torch, the part below it."""
    return ".".join(module.split(".")[: 2 if module.startswith("torch.") else 1])


def report(found: dict) -> str:
    """A table per checkout; the second has the ratio of ours to its CPU seconds."""
    parts = []
    for place, rows in found.items():
        bare, other = rows[TORCH]["cpu"], place != "here"
        lines = []
        for name, row in rows.items():
            spent = ", ".join(f"{k} {s:.2f}" for k, s in row["imports"].items() if s >= 0.01)
            line = [name, f"{row['cpu']:.2f}", f"{row['cpu'] - bare:+.2f}", f"{row['wall']:.2f}"]
            ratio = [f"{found['here'][name]['cpu'] / row['cpu']:.2f}"] if other else []
            lines.append([*line, spent, *ratio])
        parts.append(f"\n{place}:\n\n{table([*HEAD, *(['ratio'] if other else [])], lines)}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
