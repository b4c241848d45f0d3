"""What the tests of stopped runs share: undisturbed runs, made once."""

import fcntl
import os

import pytest

from attempts import run
from harness import TRAINERS


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return TRAINERS[request.param]


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory):
    """``whole(trainer)``: the folder of a run that nothing disturbed. Do not write to it."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # of all of pytest's processes

    def get(trainer):
        parent = place / "whole" / trainer.name
        parent.mkdir(parents=True, exist_ok=True)
        with (parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (parent / "done").exists():
                assert run(trainer.start(parent, "whole"), server=server) == (0, "")
                (parent / "done").touch()
        return trainer.folder(parent, "whole")

    return get
