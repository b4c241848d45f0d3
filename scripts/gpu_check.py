"""Run the sections of scripts/gpu_check.sh one after another, each in its own process.

If a section takes too long or too much memory, or lacks a package, the others still run.

    machine   a description of the machine
    digits    digits of solvers and gradients, compared with the CPU; number of waits of the host
    nccl      one process with NCCL (gloo on the CPU): averaged gradients, batch norm
    tests     the tests marked for a GPU
    profile   the kernels that take most of the time of a step
    steps     a step of each published setting: plain, ours, bfloat16, graphs, GMRES, compiled
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

try:
    from helpers.arguments import chosen

    from lib.runs.command_line import Parser, exit_code
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

ROOT = Path(__file__).parents[1]
# The most seconds that a section may take; the remaining time may be shorter.
LIMITS = {"machine": 60, "digits": 90, "nccl": 60, "tests": 120, "profile": 90, "steps": 540}
RESERVE = 5  # seconds kept free for the end


def main(argv: list[str] | None = None) -> int:
    """Run the sections; return 1 if one of them failed, else an exit code."""
    failed: list[str] = []
    code = exit_code("gpu_check.sh", lambda: failed.extend(run(argv)))
    return code or int(bool(failed))


def run(argv: list[str] | None = None) -> list[str]:
    """Run the sections; return the names of those that failed."""
    args = _parser().parse_args(argv)
    names = chosen("--sections", args.sections, LIMITS)
    deadline = time.monotonic() + 60 * args.minutes - RESERVE
    failed = []
    with open(args.out, "w", encoding="utf-8") as file:

        def tell(text: str) -> None:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()

        for name in names:
            left = deadline - time.monotonic()
            tell(f"\n## {name}\n\n")
            if left < 1:
                tell("left out: no time left\n")
                continue
            start = time.monotonic()
            if _section(name, args, min(left, LIMITS[name]), tell):
                failed.append(name)
            tell(f"\n({time.monotonic() - start:.0f} s)\n")
        tell(f"\nwrong: {', '.join(failed)}\n" if failed else "\nnothing wrong was found\n")
    return failed


def _section(name: str, args: argparse.Namespace, seconds: float, tell) -> bool:
    """Run one section; return whether it failed. A timeout or a missing package is no failure."""
    if name == "tests":
        command = ["-m", "pytest", "-m", "gpu", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
        tests = ROOT.glob("tests/**/test_*.py")
        marked = [str(p) for p in tests if "pytest.mark.gpu" in p.read_text(encoding="utf-8")]
        command += ["--continue-on-collection-errors", *sorted(marked)]
    else:
        command = ["-m", "helpers.gpu", name, "--seconds", f"{seconds:.0f}"]
        command += ["--settings", args.settings] if args.settings else []
        command += ["--device", args.device] if args.device else []
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    timer = _Timer(process, seconds)
    lines = []
    try:
        with process:
            for line in process.stdout:
                tell(line)
                lines.append(line)
    except BaseException:
        timer.fire()
        raise
    if timer.stop():
        tell("broken off: out of time\n")
        return False
    if missing := [line for line in lines if "ModuleNotFoundError: " in line]:
        tell(f"left out, all or in part: {missing[-1]}")
        return False
    return process.returncode not in (0, 5)  # pytest's 5: no test was chosen


class _Timer:
    """Kills a process that takes too long, with all processes in its session."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.fired, self._process = False, process
        self._timer = threading.Timer(seconds, self.fire)
        self._timer.start()

    def fire(self) -> None:
        self.fired = True
        self._timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> bool:
        """Stop the timer; return whether the timer killed the process."""
        self._timer.cancel()
        return self.fired


def _parser() -> Parser:
    parser = Parser(prog="gpu_check.sh", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--sections", default=",".join(LIMITS), help="sections to run, in this order")
    add("--minutes", type=float, default=9.0, help="time limit for all sections together")
    add("--settings", help="for profile and steps: names, or language, images, all")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    add("--out", type=Path, default=Path("gpu_check.md"), help="file for the output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
