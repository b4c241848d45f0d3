"""Standard streams that are closed, full or narrow cost nothing but the output."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.runs.command_line import prepare_streams
from lib.runs.run_folder import LOG, Run
from parameters import slow_but

# A command that logs some lines.
COMMAND = r"""
import sys
from pathlib import Path
from lib.runs.command_line import exit_code
from lib.runs.run_folder import Run

def action():
    run = Run(Path(sys.argv[1]), ("settings.json", "{}"))
    for i in range(3):
        run.log(f"line {i} \u00e4 \udcff")
    run.close()

sys.exit(exit_code("tool", action))
"""
ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path
    for room in ("DEQ-Sequence", "MDEQ-Vision", "MDEQ-Vision/tools", "scripts", "scripts/cluster")
    for path in (ROOT / room).glob("*.py")
    # The others import nothing that takes long, or are no commands.
    if all(part in path.read_text(encoding="utf-8") for part in ("from lib", "__main__"))
)
LINES = [f"line {i} ä \\udcff" for i in range(3)]


def logged(folder):
    return (folder / LOG).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("how", "why"),
    slow_but(
        [(">/dev/full", "No space left on device")],
        [
            (">/dev/full", "No space left on device"),
            (">/dev/full 2>&1", "No space left on device"),
            ("| true", "Broken pipe"),
            (">&-", ""),
            ("<&- >&- 2>&-", ""),
        ],
    ),
)
def test_a_stream_is_lost(tmp_path, how, why):
    """Python's own exit fails neither: a line that was not written is not tried again."""
    shell = f'set -o pipefail; {{ sleep 0.1; "$@"; }} {how}'
    command = ["bash", "-c", shell, "x", sys.executable, "-c", COMMAND, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = LINES
    said = [f"warning: the standard output is lost ({why}): see log.txt alone"] if why else []
    assert logged(tmp_path) == [first, *said, *rest]


@pytest.mark.parametrize(
    ("how", "why"),
    [(">/dev/full", "No space left on device"), ("| true", "Broken pipe")],
)
def test_what_is_printed_is_lost(how, why):
    """A command whose lines are its result ends, and says which file it could not write to."""
    code = "import sys; from lib.runs.command_line import exit_code; "
    code += "sys.exit(exit_code('tool', lambda: print('result')))"
    shell = f'set -o pipefail; {{ sleep 0.1; "$@"; }} {how}'
    command = ["bash", "-c", shell, "x", sys.executable, "-c", code]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # else nothing is left to be written again
    done = subprocess.run(command, capture_output=True, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (2, f"tool: the standard output is lost ({why})\n")


def test_a_stream_that_is_closed_is_replaced(monkeypatch):
    """Otherwise a checkpoint could get its number, and then all that is printed."""
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    assert (sys.stdin.read(), sys.stdout.write("gone")) == ("", 4)
    for stream in (sys.stdin, sys.stdout):
        stream.close()


def test_an_encoding_that_lacks_characters(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    prepare_streams()
    run = Run(tmp_path, ("settings.json", "{}"))
    run.log("ä \udcff")
    run.close()
    assert written.getvalue() == b"\\xe4 \\udcff\n"
    assert logged(tmp_path) == ["ä \\udcff"]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_an_interrupt_while_a_command_imports(script, tmp_path):
    """It is no traceback, though importing torch alone takes a second."""
    for package in ("lib", "torch"):  # whichever comes first
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise KeyboardInterrupt")
    # gpu_check.sh puts the benchmarks on the path.
    path = os.pathsep.join([str(tmp_path), str(ROOT / "scripts/benchmarks")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (130, "")


def test_the_loss_is_told_once(tmp_path, monkeypatch):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

        def fileno(self):
            raise OSError("none")

    monkeypatch.setattr(sys, "stdout", Full())
    run = Run(tmp_path, ("settings.json", "{}"))
    for line in "abc":
        run.log(line)
    run.close()
    said = "warning: the standard output is lost (No space left on device): see log.txt alone"
    assert logged(tmp_path) == ["a", said, "b", "c"]
