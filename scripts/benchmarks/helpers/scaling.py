"""Training steps in one process and in several, measured in turns within one process group."""

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from helpers.measure import in_turns
from helpers.settings import Options
from helpers.traffic import Traffic
from helpers.trainers import (
    EMBEDDED,
    batch_size,
    make_trainer,
    most_evaluations_of,
    next_step,
)
from lib.runs.processes import Processes
from lib.runs.trainer import Trainer

PHASES = ("stacked", "equilibrium")
ALONE = Processes()


@dataclass(frozen=True)
class Arrangement:
    """How the steps of a batch are shared."""

    together: bool = False  # all processes take each step together; else each its own
    everywhere: bool = False  # every process works; else the first alone, while the others wait
    wide: bool = False  # with as many threads as there are processes, else one
    weak: bool = False  # the batch is multiplied by the number of processes

    def describe(self, n: int) -> str:
        return f"{n if self.everywhere else 1} x {n if self.wide else 1}"


ARRANGEMENTS = {
    "one": Arrangement(),
    "threads": Arrangement(wide=True),
    "apart": Arrangement(everywhere=True),
    "strong": Arrangement(together=True, everywhere=True),
    "weak": Arrangement(together=True, everywhere=True, weak=True),
}


@dataclass
class Measured:
    """The counted steps of one arrangement in one process; an entry per step."""

    batch: int = 0  # of all processes that take a step together
    most: list[float] = field(default_factory=list)  # evaluations of solves to their thresholds
    seconds: list[float] = field(default_factory=list)
    nfe: list[tuple[int, int]] = field(default_factory=list)  # forward, backward
    waits: list[list[float]] = field(default_factory=list)
    bytes: list[dict[str, int]] = field(default_factory=list)
    calls: list[dict[str, int]] = field(default_factory=list)


class _Lane:
    """One arrangement's trainer in this process."""

    def __init__(self, kind: Arrangement, trainer: Trainer, threads: int):
        self.kind, self.trainer, self.threads = kind, trainer, threads
        self.batches: Iterator = trainer.batches()
        self.traffic = Traffic()
        self.traffic.watch(trainer.parallel)

    def run(self, steps: int) -> None:
        torch.set_num_threads(self.threads)
        for _ in range(steps):
            next_step(self.trainer, self.batches)

    def measure(self, steps: int, found: Measured) -> None:
        """Steps of which the first, which finds cold caches and new threads, is not counted."""
        self.run(1)
        found.batch, found.most = batch_size(self.trainer), most_evaluations_of(self.trainer)
        stats = self.trainer.model.deq.stats
        for _ in range(steps):
            self.traffic.bytes.clear()
            self.traffic.calls.clear()
            self.traffic.waits.clear()
            before = stats.forward.nfe, stats.backward.nfe
            start = time.perf_counter()
            with self.traffic.counted():
                next_step(self.trainer, self.batches)
            found.seconds.append(time.perf_counter() - start)
            found.nfe.append((stats.forward.nfe - before[0], stats.backward.nfe - before[1]))
            found.waits.append(list(self.traffic.waits))
            found.bytes.append(dict(self.traffic.bytes))
            found.calls.append(dict(self.traffic.calls))


@dataclass(frozen=True)
class Plan:
    """How many steps: ``lead`` of training before each phase, then ``warmup`` and ``steps`` of
    every arrangement, in turns of ``turn``."""

    lead: int
    warmup: int
    steps: int
    turn: int

    @property
    def rounds(self) -> int:
        return -(-self.steps // self.turn)

    @property
    def each(self) -> int:
        """Steps of an arrangement in a phase, without the lead."""
        return self.warmup + self.rounds * (1 + self.turn)


def measure(
    name: str, processes: Processes, options: Options, plan: Plan, *, batch: int | None, kinds: dict
) -> dict[str, dict[str, list[Measured]]]:
    """Phase -> arrangement -> what each process that took part measured, by rank."""
    lead = plan.lead if name in EMBEDDED else 0  # the others have weights that are as if trained
    n, lanes = processes.world_size, {}
    # Where all train together, the weights that all arrangements start from are trained first.
    for kind_name, kind in {"strong": ARRANGEMENTS["strong"], **kinds}.items():
        if not (kind.everywhere or processes.leads):
            continue
        trainer = make_trainer(
            name,
            processes if kind.together else ALONE,
            options,
            batch=batch,
            times=n if kind.weak else 1,
            stacked=lead + plan.each,
        )
        lanes[kind_name] = _Lane(kind, trainer, n if kind.wide else 1)
    found = {}
    for phase in PHASES:
        if lead:
            lanes["strong"].run(lead)
            _give_weights(lanes["strong"].trainer, lanes)
        for kind_name in kinds:
            _together(lanes.get(kind_name), lambda lane: lane.run(plan.warmup))
        found[phase] = _rounds(lanes, list(kinds), plan, processes)
    return found


def _give_weights(source: Trainer, lanes: dict[str, _Lane]) -> None:
    for lane in lanes.values():
        if lane.trainer is not source:
            lane.trainer.model.load_state_dict(source.model.state_dict())
            lane.trainer.optimizer.load_state_dict(deepcopy(source.optimizer.state_dict()))
            lane.trainer.step = source.step


def _rounds(lanes: dict, names: list[str], plan: Plan, processes: Processes) -> dict:
    found = {name: Measured() for name in names}
    for _, name in in_turns(names, plan.rounds):
        _together(lanes.get(name), lambda lane, to=found[name]: lane.measure(plan.turn, to))
    return {
        name: [one for one in processes.gather(measured) if one.seconds]
        for name, measured in found.items()
    }


def _together(lane: _Lane | None, action) -> None:
    """Let those that have the lane act, while the others wait without computing."""
    dist.barrier()
    if lane is not None:
        action(lane)
    dist.barrier()
