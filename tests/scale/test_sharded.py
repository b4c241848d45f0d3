"""FSDP2 in two processes (gloo), of which one needs far fewer evaluations of f than the other."""

from pathlib import Path

import pytest
import torch

from groups import run_group
from lib.deq import DEQ
from lib.errors import InputError
from lib.runs.processes import Processes
from sharded import sharded

SCRIPT = Path(__file__).with_name("sharded.py")


@pytest.mark.parametrize(
    ("f_solver", "b_solver", "grad"),
    [
        ("anderson", "gmres", "ift"),
        pytest.param("broyden", "broyden", "shine:refine=60", marks=pytest.mark.slow),
        pytest.param("fixed_point_iteration", "bicgstab", "ift", marks=pytest.mark.slow),
        pytest.param("broyden:stop=sample", "anderson", "ift", marks=pytest.mark.slow),
    ],
)
def test_processes_stay_in_step(tmp_path, server, f_solver, b_solver, grad):
    """In the middle of a solve, each would wait for ever for one that has stopped."""
    arguments = f"{f_solver}{',' if ':' in f_solver else ':'}eps=1e-9", f"{b_solver}:eps=1e-9", grad
    alone = sharded(Processes(), *arguments)
    first, second = run_group(SCRIPT, 2, tmp_path / "two", *arguments, server=server, timeout=120)
    assert first["forward"] > 2 * second["forward"]
    assert first["backward"] > second["backward"]
    assert first["calls"] == second["calls"]  # those in vain included
    found = torch.cat([first["z"], second["z"]])
    torch.testing.assert_close(found, alone["z"], rtol=1e-7, atol=1e-7)
    for part in (first, second):
        torch.testing.assert_close(part["gradient"], alone["gradient"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("anderson", {}, "under autocast.*mp_policy"),
        ("anderson", {"indexing": (3,)}, "indexing.*leave it out"),
        ("newton_krylov:inner=5", {}, "newton_krylov differentiates"),
        ("broyden", {"jac_vecs": 1}, "Jacobian loss differentiates"),
    ],
)
def test_what_shards_cannot_do_is_refused(solver, options, words):
    half = solver == "anderson" and not options
    with torch.autocast("cpu", enabled=half), pytest.raises(InputError, match=words):
        DEQ(solver, group="any")(torch.tanh, torch.zeros(1, 3), **options)
