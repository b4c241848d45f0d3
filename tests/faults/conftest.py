"""What the tests of stopped runs share: undisturbed runs, made once."""

import pytest

from attempts import run
from harness import TRAINERS


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return TRAINERS[request.param]


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory):
    """``whole(trainer)``: the folder of a run that nothing disturbed. Do not write to it."""
    folders = {}

    def get(trainer):
        if trainer not in folders:
            parent = tmp_path_factory.mktemp("whole")
            assert run(trainer.start(parent, "whole"), server=server) == (0, "")
            folders[trainer] = trainer.folder(parent, "whole")
        return folders[trainer]

    return get
