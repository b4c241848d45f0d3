"""Two machines in one: network namespaces joined by a virtual cable, a launch file in each."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARK = "TWO_MACHINES"  # an environment variable that tells whose a process is
_CABLE = "cable"
_NAMES, _ADDRESSES = ("machine1", "machine2"), ("10.77.0.1", "10.77.0.2")
# Names of their own, as machines have: by them torchrun finds out who hosts the rendezvous. And
# the kernel gives a silent connection up after 6 seconds, not after a quarter of an hour.
_BECOME = """
    hostname "$1" && mount --bind "$2" /etc/hosts && echo 4 >/proc/sys/net/ipv4/tcp_retries2 &&
    shift 2 && exec "$@"
"""


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until ``condition`` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)


class Launch:
    """A launch file that runs on a machine; what it prints is kept in files."""

    def __init__(self, command: list[str], environment: dict[str, str], files: Path):
        self._out, self._err = files.with_suffix(".out"), files.with_suffix(".err")
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ended(self, seconds: float) -> int:
        """Its exit code, as soon as it has one."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds:.0f} s:\n{self.err}") from None


@dataclass
class Machine:
    """One of the two.

    Attributes:
        name: that its files have.
        prefix: what begins a command that is to run there.
        environment: what all its processes have.
    """

    name: str
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._mark = uuid.uuid4().hex
        self._launches: list[Launch] = []

    def launch(self, words: list[str], files: Path, **variables: str) -> Launch:
        """Start ``scripts/cluster/multinode.sh`` with ``words`` and environment variables."""
        environment = os.environ | self.environment | variables | {_MARK: self._mark}
        command = [*self.prefix, "bash", str(ROOT / "scripts/cluster/multinode.sh"), *words]
        self._launches.append(Launch(command, environment, files))
        return self._launches[-1]

    def processes(self, *, workers: bool = False) -> list[int]:
        """All that run on it, or those that torchrun started."""
        found = []
        for folder in Path("/proc").iterdir():
            # No process; gone by now; another user's; or a zombie, which has no environment.
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                mine = f"{_MARK}={self._mark}".encode() in variables
                if mine and (not workers or any(v.startswith(b"LOCAL_RANK=") for v in variables)):
                    found.append(int(folder.name))
        return found

    def signal(self, number: int, *, workers: bool = False) -> None:
        """Send a signal to all processes, or to those that torchrun started."""
        for pid in self.processes(workers=workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def power_off(self) -> None:
        """End all processes at once."""

        def dark() -> bool:  # also what is being started meanwhile
            self.signal(signal.SIGKILL)
            return not self.processes()

        wait_until(dark, 60, "SIGKILL")
        for launch in self._launches:
            launch.process.wait(60)


@dataclass
class Pair:
    """The two machines; torchrun's rendezvous is on the first, ``master``.

    Attributes:
        cable: ``cable("down")`` cuts it, ``cable("up")`` mends it; None: there is none to cut.
    """

    machines: tuple[Machine, Machine]
    master: str
    cable: Callable[[str], None] | None = None

    def launch(self, words: list[str], files: Path, **variables: str) -> list[Launch]:
        """The same line on both, for one process each."""
        files.mkdir(parents=True)
        where = {"MASTER": self.master, "NODES": "2", "GPUS": "1", "PORT": str(_free_port())}
        variables = where | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
        return [m.launch(words, files / m.name, **variables) for m in self.machines]

    def power_off(self) -> None:
        for machine in self.machines:
            machine.power_off()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def one_machine() -> Iterator[Pair]:
    """Two launch files side by side, for where there can be no namespaces."""
    machines = [
        Machine(
            name,
            environment={
                "GLOO_SOCKET_IFNAME": "lo",
                "TORCHRUN": f"--local_addr=127.0.0.1 --rdzv_conf=is_host={name == _NAMES[0]:d}",
            },
        )
        for name in _NAMES
    ]
    pair = Pair(tuple(machines), "127.0.0.1")
    try:
        yield pair
    finally:
        pair.power_off()


@contextlib.contextmanager
def two_machines() -> Iterator[Pair]:
    """Two network namespaces; nothing that runs there reaches beyond them.

    Raises:
        PermissionError: the system, or this user's rights, do not allow them.
    """
    tag = f"two{os.getpid()}"
    spaces = [f"{tag}-{name}" for name in _NAMES]
    hosts = Path(tempfile.gettempdir()) / f"{tag}.hosts"
    known = zip(("127.0.0.1", *_ADDRESSES), ("localhost", *_NAMES), strict=True)
    hosts.write_text("".join(f"{address} {name}\n" for address, name in known))
    enter = "unshare --uts --mount sh -c".split()
    machines = [
        Machine(
            name,
            ["ip", "netns", "exec", space, *enter, _BECOME, "sh", name, str(hosts)],
            {"GLOO_SOCKET_IFNAME": _CABLE},
        )
        for name, space in zip(_NAMES, spaces, strict=True)
    ]

    def cable(state: str) -> None:
        _run("ip", "-n", spaces[1], "link", "set", _CABLE, state)

    pair = Pair(tuple(machines), _NAMES[0], cable)
    # A time limit must not leave the namespaces behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for space in spaces:
            _run("ip", "netns", "add", space)
        peer = ["peer", "name", _CABLE, "netns", spaces[1]]
        _run("ip", "link", "add", _CABLE, "netns", spaces[0], "type", "veth", *peer)
        for space, address in zip(spaces, _ADDRESSES, strict=True):
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", _CABLE)
            for link in ("lo", _CABLE):
                _run("ip", "-n", space, "link", "set", link, "up")
        for machine in machines:
            _run(*machine.prefix, "true")
        yield pair
    finally:
        pair.power_off()
        for space in spaces:
            with contextlib.suppress(PermissionError):  # it may not have come to that
                _run("ip", "netns", "del", space)
        hosts.unlink()
        signal.signal(signal.SIGTERM, before)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise PermissionError(f"there is no command {error.filename}") from None
    if done.returncode:
        raise PermissionError(f"{command[0]}: {done.stderr.strip()}")
