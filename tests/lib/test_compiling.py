"""torch.compile: one line where it does not work, no silent limit where it does."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from lib.errors import InputError
from lib.graphs import MAX_FORMS, _try_compiler, compiled


@pytest.fixture(autouse=True)
def _compilers_are_tried_again():
    _try_compiler.cache_clear()
    yield
    _try_compiler.cache_clear()


@pytest.fixture
def without_code(monkeypatch):
    """Trace as torch.compile does, but generate no code, which takes seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def double(x):
    return 2 * x


@pytest.mark.parametrize("message", ["no compiler\nand a long story", ""])
def test_a_compiler_that_fails_is_refused_in_one_line(monkeypatch, message):
    def failing(function, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(InputError, match="switch compilation off") as caught:
        compiled(double)
    assert "\n" not in str(caught.value)
    assert (message.split("\n")[0] or "RuntimeError") in str(caught.value)


def test_more_forms_than_pytorch_allows_by_itself(without_code):
    """One for each size; after eight the others would be computed without compiling."""
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    function = compiled(lambda x: 3 * x)
    before = graphs["unique_graphs"]
    for size in range(1, 13):
        assert torch.equal(function(torch.ones(size)), torch.full([size], 3.0))
    assert graphs["unique_graphs"] == before + 12
    assert MAX_FORMS > 12


@pytest.mark.slow
def test_a_missing_compiler(tmp_path):
    code = "from lib.graphs import compiled; compiled(abs)"
    environment = os.environ | {
        "CXX": "/nowhere/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    last = done.stderr.splitlines()[-1]
    assert "lib.errors.InputError: torch.compile does not work here" in last
    assert "/nowhere/g++" in last


@pytest.mark.slow
def test_compiled_code_gives_the_same():
    x = torch.randn(5, 7)
    function = compiled(lambda x: torch.softmax(x.relu() * 3, 1))
    for n in (5, 4, 3):
        torch.testing.assert_close(function(x[:n]), torch.softmax(x[:n].relu() * 3, 1))
