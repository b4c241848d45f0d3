"""What tests of several rooms share."""

import fcntl
import os

import pytest
import torch
from hypothesis import settings

from attempts import ForkServer
from deq_sequence.text.corpus import get_lm_corpus
from lib.runs.run_folder import Run

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _same_threads():
    """A command may set the number of threads, which is of the whole process: put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The embedded corpus, built once (ten seconds). Do not write to it: copy it."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # of all of pytest's processes
    folder = place / "demo" / "data"
    with (place / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            get_lm_corpus(folder, "demo")
    return folder


@pytest.fixture(scope="session")
def server():
    """A process that has done the imports, for tests that start commands."""
    with ForkServer() as server:
        yield server


@pytest.fixture
def stop_at(monkeypatch):
    """Make a run stop right after a record of a step, before anything is saved; once."""
    real = Run.record

    def arm(step, kind="train"):
        def record(self, what, at, **values):
            real(self, what, at, **values)
            if (what, at) == (kind, step):
                monkeypatch.setattr(Run, "record", real)
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "record", record)

    return arm
