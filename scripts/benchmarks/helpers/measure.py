"""Time, memory, the machine, and tables in markdown, for the benchmarks."""

import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lib.errors import InputError


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of ``action``, to the end of what it started on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name) for all names in every round.

    Who begins changes from round to round, so that no name always follows the same one.
    """
    names = list(names)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            yield turn, name


class Counted:
    """A function of one argument; ``count`` is the number of its calls."""

    def __init__(self, function: Callable):
        self._function, self.count = function, 0

    def __call__(self, argument):
        self.count += 1
        return self._function(argument)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(action: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Most bytes that ``action`` held at once beyond those held before; call it in a new process.

    "resident" is what the operating system counts (what is never touched does not count, what
    libraries hold beside tensors does; on a GPU: what PyTorch has reserved), "tensors" what
    PyTorch allocated.
    """
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        synchronize(device)
        peak = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return {"resident": peak[0] - before[0], "tensors": peak[1] - before[1]}
    before = resident_bytes("VmHWM")
    action()
    resident = resident_bytes("VmHWM") - before
    return {"resident": resident, "tensors": peak_tensor_bytes(action)}


def peak_tensor_bytes(action: Callable[[], object]) -> int:
    """Most bytes of tensors that ``action`` held at once beyond those held before (CPU)."""
    return max(_held(action), default=0)


def held_bytes(action: Callable[[], object]) -> int:
    """Bytes of tensors that are there because of ``action``, as long as its result is (CPU)."""
    return [0, *_held(action)][-1]


def _held(action: Callable[[], object]) -> list[int]:
    """Bytes of tensors beyond those held before, after each allocation or release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line per profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def resident_bytes(kind: str) -> int:
    """Resident memory of this process (Linux): "VmRSS" now, "VmHWM" at most so far."""
    # Not getrusage: its figure begins with that of the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", status).group(1))


def in_new_process(function: Callable, *arguments):
    """``function(*arguments)`` in a process of its own, which ends afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(function, arguments)
        pool.close()  # else it is killed, and cannot clean up
        pool.join()
        return found


def describe_machine(device: torch.device) -> str:
    """Hardware, versions and date, one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    with suppress(PackageNotFoundError):
        versions += f", torchdeq {version('torchdeq')}"
    return f"{date.today()} | {hardware} | {versions}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        " | ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True))
        for row in [head, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def fill(page: str, name: str, body: str) -> str:
    """Return the page with ``body`` between the two comments of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise InputError(f"a page needs the two lines {begin!r} and {end!r}, once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"
