"""One start of a training command, in a process group of its own, watched through its output.

A start of the command takes seconds, nearly all of them for imports. A :class:`ForkServer` has
done the imports, and forks for every attempt; what a child runs is the script itself. The command
proper remains the reference: whoever uses a server compares with runs that did without.
"""

import atexit
import gc
import json
import os
import re
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

# Of the lines "step 7 | epoch 0 | ...", "epoch 0 [7/20] | step 7 | ..." and "step 7 | valid ...".
_STEP = re.compile(r"\bstep (\d+) \| (valid)?")
_PATIENCE = 120  # seconds without a line after which a run hangs
# Modules of both rooms, and what a command imports where it is used.
_LAZY = (
    "deq_sequence.command",
    "mdeq_vision.command",
    "sklearn.datasets",
    "torch._dynamo",  # by every optimiser of PyTorch
    "torchinfo",
)
# Models this small gain nothing from a second thread, and on a busy machine the first one would
# wait for it in every operation.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _environment() -> dict[str, str]:
    """Helper modules, which the tests' settings put on the path, are found by the processes too."""
    return os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Attempt:
    """Start ``command`` (a script and its arguments); leaving the ``with`` block ends it.

    Args:
        command: the script and its arguments.
        server: fork from it instead of starting an interpreter.
        folder: to run in; None for this process's own.
        max_file_size: bytes beyond which a write to a file fails, as on a full disk.
        patience: seconds without a line of output after which :meth:`wait` gives up.
    """

    def __init__(
        self, command, *, server=None, folder=None, max_file_size=None, patience=_PATIENCE
    ):
        self.patience = patience
        self.lines: list[str] = []  # of output, so far
        self.steps: dict[str, int] = {}  # the last one in them, of each kind
        self.began, self.seconds_to_first_step = time.monotonic(), None
        self._text, self._ended = b"", False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self._output, out = os.pipe()
        self._server, self._process, self._status = server, None, None
        if server is None:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdout=out,
                stderr=self._errors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=folder,
                env=_environment(),
                preexec_fn=lambda: _prepare(max_file_size),
            )
            self.pid = self._process.pid
        else:
            folder = os.path.abspath(folder or os.curdir)
            self.pid = server.start(command, folder, max_file_size, out, self._errors.fileno())
        os.close(out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._status is None:
            self.send(signal.SIGKILL)
            self.wait()
        os.close(self._output)
        self._errors.close()

    def line(self) -> str | None:
        """The next line of output as soon as it is there; None at its end.

        Raises:
            TimeoutError: no line came for too long.
        """
        while b"\n" not in self._text and not self._ended:
            ready, _, _ = select.select([self._output], [], [], self.patience)
            if not ready:
                raise TimeoutError(f"no output for {self.patience} s; so far: {self.errors()}")
            found = os.read(self._output, 1 << 16)
            self._text, self._ended = self._text + found, not found
        line, _, self._text = self._text.partition(b"\n")
        if not line and self._ended:
            return None
        self.lines.append(line.decode())
        if match := _STEP.search(self.lines[-1]):
            kind = match[2] or "train"
            self.steps[kind] = int(match[1])
            if self.seconds_to_first_step is None:
                self.seconds_to_first_step = time.monotonic() - self.began
        return self.lines[-1]

    def wait_for_step(self, step: int) -> bool:
        """Return when the line of a training step or a later one is there; False if none came."""
        while self.steps.get("train", -1) < step:
            if self.line() is None:
                return False
        return True

    def send(self, number: int) -> None:
        """Signal the whole process group."""
        os.killpg(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal, once the process has ended."""
        while self.line() is not None:
            pass
        if self._status is None:
            wait = self._server.wait if self._server else lambda _: self._process.wait()
            self._status = wait(self.pid)
        return self._status

    def errors(self) -> str:
        """What the process wrote to its error stream."""
        self._errors.seek(0)
        return self._errors.read().decode()


def run(command, **options) -> tuple[int, str]:
    """Run to the end: the exit code and the error stream."""
    with Attempt(command, **options) as attempt:
        return attempt.wait(), attempt.errors()


def _prepare(max_file_size: int | None = None) -> None:
    # A job that a script has put into the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _limit_files(max_file_size)


def _limit_files(size: int | None) -> None:
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---- the server --------------------------------------------------------------------------------


class ForkServer:
    """A process that has imported what the commands import, and forks one attempt at a time."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_environment(),
                preexec_fn=_prepare,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()  # the server ends with it
        self._process.wait()

    def start(self, command, folder: str, max_file_size, out: int, err: int) -> int:
        """Fork an attempt that writes to two file descriptors; its process id."""
        request = {"command": command, "folder": folder, "max_file_size": max_file_size}
        request = json.dumps(request)
        socket.send_fds(self._socket, [request.encode()], [out, err])
        return int(self._socket.recv(100))

    def wait(self, pid: int) -> int:
        """The exit code of an attempt that ends; until then its process id remains its own."""
        self._socket.send(json.dumps({"wait": pid}).encode())
        return int(self._socket.recv(100))


def _serve(connection: socket.socket) -> None:
    """Answer requests until the other end closes; a child returns from here to run its script."""
    for name in _LAZY:
        __import__(name)
    # The text that a validation generates takes a third of the time of a run this small. The run
    # is the same without it; tests/sequence/test_events.py and the command proper have it.
    sys.modules["deq_sequence.events"].TextEvents.sample = lambda *arguments: None
    gc.freeze()  # else the end of each child, and its collections, walk through all modules
    while True:
        message, files, *_ = socket.recv_fds(connection, 1 << 16, 2)
        if not message:
            return
        request = json.loads(message)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        os.setpgid(pid, pid)  # by both, as either may be the first to need it
        if pid == 0:
            connection.close()
            for number, file in enumerate(files, start=1):
                os.dup2(file, number)
                os.close(file)
            _limit_files(request["max_file_size"])
            os.chdir(request["folder"])
            sys.argv = request["command"]
            _run_script()
            return
        for file in files:
            os.close(file)
        connection.send(str(pid).encode())


def _run_script() -> None:
    """Run the script of sys.argv to the end of this process.

    After sys.exit(code) all is done as in an interpreter's end, but that modules are not taken
    apart one by one: with all that the server has imported, this takes half a second.
    """
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int) or threading.active_count() > 1:
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
