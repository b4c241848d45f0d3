"""What malloc holds without need goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

from lib.runs.evaluation_loop import release_free_memory

# Blocks in the heap, not in mappings of their own; the last one stays, so that the end of the heap
# is not free.
HOLES = """
from lib.runs.evaluation_loop import release_free_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

blocks = [b"x" * 60_000 for _ in range(2000)]
full = resident()
del blocks[:-1]
kept = resident()
release_free_memory()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc"
)
def test_holes_in_the_heap_are_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 20e6  # the C library alone keeps them
    assert after > 100e6  # of 120 MB


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    release_free_memory()
