"""bench_solvers.py, with stand-ins for torchdeq's solvers (it is an optional package)."""

import json
import sys
from types import ModuleType

import bench_solvers
import pytest
import torch
from helpers import measure

from lib.solvers import SOLVERS


@pytest.fixture
def torchdeq(monkeypatch):
    """Modules of torchdeq's names whose solvers are ours, evaluated at one point more."""

    def stand_in(name):
        def solver(f, x0, max_iter, tol, stop_mode):
            f(x0)
            found = SOLVERS[name](f, x0, threshold=max_iter, eps=tol, stop_mode=stop_mode)
            return found["result"], [], {}

        return solver

    for name in ("torchdeq", "torchdeq.solver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in bench_solvers.METHODS:
        module = ModuleType(f"torchdeq.solver.{name}")
        setattr(module, f"{name}_solver", stand_in(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # A new process would not have the stand-ins.
    monkeypatch.setattr(bench_solvers, "in_new_process", lambda function, *args: function(*args))


def test_the_command_prints_its_tables(torchdeq, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_solvers, "SHAPES", {"tiny": (2, 8), "words": (2, 16, 3)})
    monkeypatch.setattr(bench_solvers, "MEMORY_STEPS", (3, 5))
    path = tmp_path / "figures.json"
    argv = ["--shapes", "tiny", "--repeats", "3", "--iterations", "5", "--hard_steps", "4"]
    assert bench_solvers.main([*argv, "--device", "cpu", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in ("Overhead beside f", "Peak extra memory of", "radius 0.99", "against iterations"):
        assert words in printed
    figures = json.loads(path.read_text())
    broyden, anderson = figures["overhead"]
    assert (broyden["ours"]["nfe"], broyden["torchdeq"]["nfe"]) == (6, 7)
    assert (anderson["ours"]["nfe"], anderson["torchdeq"]["nfe"]) == (5, 6)
    assert broyden["ours"]["residual"] == broyden["torchdeq"]["residual"] > 0
    # The hard case again, in full.
    f, x0 = bench_solvers.hard_map(torch.device("cpu"))
    radius = torch.linalg.eigvalsh(torch.func.jacrev(f)(x0[:1])[0, :, 0].double()).abs().max()
    assert radius == pytest.approx(0.99, abs=1e-5)
    z = SOLVERS["broyden"](f, x0, threshold=4, eps=0.0)["result"]
    assert figures["hard"][0]["ours"] == bench_solvers.relative_residual(f, z)


def test_without_torchdeq(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchdeq.solver.anderson", None)
    assert bench_solvers.main(["--shapes", "tiny"]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps torchdeq==0.1.0" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--iterations", "--repeats", "--hard_steps"])
def test_a_number_that_is_too_small(flag, capsys):
    assert bench_solvers.main([flag, "2"]) == 2
    assert f"{flag} is 2" in capsys.readouterr().err


def test_peak_counts_what_is_held_at_once():
    def action():
        first = torch.zeros(250_000)  # 1 MB
        second = first + 1
        del first
        return second + 1  # two at once, never three

    counted = measure.peak_extra_bytes(action, torch.device("cpu"))
    assert 2_000_000 <= counted["tensors"] < 2_010_000


def test_resident_memory_of_a_new_process():
    found = measure.in_new_process(
        bench_solvers.peak_bytes, "ours", "anderson", (8, 500_000), 9, "cpu"
    )
    # Six residuals, six mixed values, a few points: of 16 MB each.
    assert 13 * 16e6 < found["tensors"] < 19 * 16e6
    assert 13 * 16e6 < found["resident"] < 21 * 16e6
