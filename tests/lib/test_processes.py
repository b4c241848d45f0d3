"""What the processes of a run do together, in three of them (gloo), started once."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from groups import run_group, work
from lib.errors import InputError
from lib.runs.processes import Processes

N = 3

# ---- what each process does ---------------------------------------------------------------------


def found_by(processes: Processes, folder: str) -> dict:
    """What one of them sees of every function."""
    found = {"torchrun": (processes.rank, processes.world_size, processes.leads)}
    tensor = torch.tensor([1.0, 10.0**-processes.rank])
    found["sum"], found["in place"] = processes.sum(tensor), tensor
    found["gather"] = processes.gather({"rank": processes.rank, "t": torch.ones(processes.rank)})
    found["lead"] = lead(processes)
    for name, local_rank in (("one machine", processes.rank), ("two machines", processes.rank % 2)):
        found[name] = in_turn(processes, Path(folder), name, local_rank)
    found["next"] = following(processes)
    found["replicate"] = replicated(processes)
    found["seeds"] = draws(processes)
    return found


def lead(processes: Processes) -> dict:
    """Results and errors of what the first process does for all."""
    acted = []

    def act(result):
        acted.append(result)
        if isinstance(result, Exception):
            raise result
        return result

    seen = {"result": processes.lead(lambda: act({"path": Path("a"), "rank": processes.rank}))}
    for error in (InputError("no such flag"), FileNotFoundError(2, "No such file", "b/c.txt")):
        try:
            processes.lead(lambda error=error: act(error))
        except Exception as raised:
            seen[type(error).__name__] = raised
    # An error leaves nobody waiting: the next exchange is in step.
    seen["after"] = processes.lead(lambda: "again")
    seen["acted"] = len(acted)
    return seen


def in_turn(processes: Processes, folder: Path, name: str, local_rank: int) -> dict:
    """Who found the file that the first process of a machine takes its time to make."""
    here = Processes(processes.rank, processes.world_size, local_rank)
    file = folder / f"{name} {processes.rank - local_rank}"

    def make():
        there = file.exists()
        if not there:
            time.sleep(0.3)
            file.touch()
        return there

    found = {"there": here.in_turn(make)}

    def fail():
        if local_rank == 0:
            raise InputError("of the first one's own")
        return "fine"

    try:
        found["failing"] = here.in_turn(fail)
    except InputError as error:
        found["failing"] = str(error)
    return found


def following(processes: Processes) -> list:
    """The items of an iterator that breaks in one process, at its second item."""

    def items():
        yield 10 * processes.rank
        if processes.rank == 1:
            raise ZeroDivisionError("a corrupt picture")
        yield 1

    seen, rest = [], items()
    try:
        while (item := processes.next(rest)) is not None:
            seen.append(item)
    except Exception as error:
        seen.append((type(error).__name__, str(error)))
    return [*seen, processes.next(iter(()))]  # which are in step again


def replicated(processes: Processes) -> dict:
    """A model that every process initialises otherwise, and one backward pass of it."""
    torch.manual_seed(processes.rank)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model[1].running_mean.fill_(processes.rank)
    parallel = processes.replicate(model, torch.device("cpu"))
    seen = {
        "parallel": isinstance(parallel, DistributedDataParallel),
        "forward of its own": "forward" in vars(model),
        "gradients at first": [p.grad for p in model.parameters() if p.grad is not None],
        "before": before,
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "statistics": model[1].running_mean.clone(),
    }
    output = parallel(torch.ones(2, 2) * torch.tensor([[1.0], [2.0]]))
    (output.sum() * 0 + (processes.rank + 1) * model[0].bias.sum()).backward()
    seen["gradient"] = model[0].bias.grad.clone()
    return seen


def draws(processes: Processes) -> dict:
    torch.manual_seed(7)
    torch.rand(5)  # of the model's initial weights, say
    processes.vary_seed(7)
    return {"first": torch.rand(3), "then": torch.rand(3)}


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("group")
    return run_group(__file__, N, folder / "found", str(folder), server=server, timeout=120)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_part(world_size):
    for n in range(12):
        parts = [Processes(rank, world_size).part(n) for rank in range(world_size)]
        things = list(range(n))
        assert [thing for part in parts for thing in things[part]] == things
        sizes = [len(things[part]) for part in parts]
        assert sizes == sorted(sizes, reverse=True)  # the first ones get what is over
        assert max(sizes) - min(sizes) <= 1


def test_ranks(found):
    assert [f["torchrun"] for f in found] == [(0, N, True), (1, N, False), (2, N, False)]


def test_sum(found):
    for f in found:
        assert torch.equal(f["sum"], torch.tensor([3.0, 1.11]))
        assert torch.equal(f["in place"], f["sum"])


def test_gather(found):
    for f in found:
        assert [value["rank"] for value in f["gather"]] == [0, 1, 2]
        assert [len(value["t"]) for value in f["gather"]] == [0, 1, 2]


def test_lead(found):
    assert [f["lead"]["acted"] for f in found] == [3, 0, 0]
    for f in found:
        seen = f["lead"]
        assert seen["result"] == {"path": Path("a"), "rank": 0}
        assert seen["after"] == "again"
        assert type(seen["InputError"]) is InputError
        assert str(seen["InputError"]) == "no such flag"
        error = seen["FileNotFoundError"]
        assert (error.errno, error.filename) == (2, "b/c.txt")


def test_next_raises_an_error_in_all_processes(found):
    said = "process 1: a corrupt picture"
    own = ("ZeroDivisionError", "a corrupt picture")
    assert [f["next"] for f in found] == [
        [0, ("InputError", said), None],
        [10, own, None],
        [20, ("InputError", said), None],
    ]


def test_in_turn(found):
    assert [f["one machine"]["there"] for f in found] == [False, True, True]
    # Ranks 0 and 1 share a machine; rank 2 is the first of another one.
    assert [f["two machines"]["there"] for f in found] == [False, True, False]


def test_in_turn_leaves_an_error_to_whom_it_happened(found):
    own = "of the first one's own"
    assert [f["one machine"]["failing"] for f in found] == [own, "fine", "fine"]
    assert [f["two machines"]["failing"] for f in found] == [own, "fine", own]


def test_replicate_begins_with_the_weights_of_the_first(found):
    first = found[0]["replicate"]
    for rank, f in enumerate(found):
        seen = f["replicate"]
        assert seen["parallel"]
        for name, value in seen["weights"].items():
            assert torch.equal(value, first["before"][name])
        assert torch.equal(seen["before"]["0.weight"], first["before"]["0.weight"]) == (rank == 0)
        assert torch.equal(seen["statistics"], torch.full((3,), float(rank)))


def test_replicate_averages_gradients(found):
    """And leaves the model as it was: no gradients, its own forward."""
    for f in found:
        seen = f["replicate"]
        assert torch.equal(seen["gradient"], torch.full((3,), 2.0))  # (1 + 2 + 3) / 3
        assert seen["gradients at first"] == []
        assert not seen["forward of its own"]


def test_vary_seed(found):
    """The first process goes on with the stream that one process alone would have."""
    assert torch.equal(found[0]["seeds"]["first"], draws(Processes())["first"])
    drawn = torch.stack([f["seeds"][when] for f in found for when in ("first", "then")])
    assert len(drawn.unique()) == drawn.numel()


def test_one_process_needs_no_others():
    alone = Processes()
    assert alone.part(5) == slice(0, 5)
    assert alone.gather("a") == ["a"]
    assert alone.lead(lambda: 3) == alone.in_turn(lambda: 3) == 3
    assert torch.equal(alone.sum(torch.ones(2)), torch.ones(2))
    model = nn.Linear(2, 2)
    assert alone.replicate(model, torch.device("cpu")) is model


if __name__ == "__main__":
    import sys

    work(found_by, sys.argv[1:])
