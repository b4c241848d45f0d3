"""How long a step would take on N GPUs, from what is counted, measured and assumed.

    step  = solves + rest + sums over processes
    solve = evaluations x (max(floor / utilisation, launches) + host's wait)

where the floor is the arithmetic at the peak rate plus the solver's least traffic at the memory's
bandwidth, as in floor.py beside this file, for the largest share of a batch that a GPU has. An
evaluation cannot be queued ahead of its predecessor, as the host waits for a residual after each:
so its kernels take at least the time to launch them. Nothing overlaps: gradients are all there
only once the adjoint is solved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from helpers.steps import least_bytes
from helpers.work import Cost, Work

_ELEMENT = 4  # bytes of a state's element: float32 in any number format


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links: rates of public data sheets, and times that are assumed."""

    name: str = "NVIDIA A100 80 GB SXM"
    # FLOP/s of dense matrix products, by number format.
    peak: dict[str, float] = field(default_factory=lambda: {"bf16": 312e12, "tf32": 156e12})
    memory: float = 2.039e12  # bytes/s of its memory
    near: float = 300e9  # bytes/s between the GPUs of a machine in one direction (NVLink 3)
    far: float = 25e9  # between machines: one port of 200 Gb/s for each
    per_machine: int = 8  # GPUs
    launch: float = 5e-6  # seconds to start a kernel
    wait: float = 20e-6  # to bring a number to the host
    latency: float = 10e-6  # for one hop of a collective


@dataclass(frozen=True)
class Measured:
    """What this repository's benchmarks measured on a CPU; pairs are forward and backward."""

    utilisation: float  # floor of a step over its time
    filled: tuple[float, float] = (1.0, 1.0)  # evaluations over those of a solve to its threshold
    # Evaluations of many processes and steps over their mean; empty: all need as many.
    spread: tuple[Sequence[float], Sequence[float]] = ((), ())

    def slowest(self, which: int, n: int) -> float:
        """Expected evaluations of the slowest of n independent solves over those of all."""
        return expected_maximum(self.spread[which], n) if self.spread[which] else 1.0

    def evaluations(self, which: int, n: int) -> float:
        """Those of the slowest of n solves, over those of one that runs to its threshold."""
        return min(self.filled[which] * self.slowest(which, n), 1.0)


@dataclass(frozen=True)
class Step:
    """Seconds of a step: where the GPU computes, where it waits for launches and for the host, and
    where processes sum; at equilibrium."""

    compute: float
    launches: float
    transfer: float
    latency: float

    @property
    def seconds(self) -> float:
        return self.compute + self.launches + self.transfer + self.latency

    @property
    def limit(self) -> str:
        """The part that takes most of the time."""
        parts = vars(self)
        return max(parts, key=parts.get)


def expected_maximum(values: Sequence[float], n: int) -> float:
    """Expected largest of n independent draws from ``values``."""
    ordered, m = sorted(values), len(values)
    return sum(v * ((i / m) ** n - ((i - 1) / m) ** n) for i, v in enumerate(ordered, 1))


def step_on(
    work: Work, n: int, share: int, kind: str, gpu: Hardware, measured: Measured, stacked: bool
) -> Step:
    """A step on n GPUs of which the busiest has ``share`` samples."""
    compute = launches = 0.0

    def add(times: float, cost: Cost, kernels: float, traffic: float, waits: float) -> None:
        nonlocal compute, launches
        floor = share * cost.flops / gpu.peak[kind] + traffic / gpu.memory
        busy, started = floor / measured.utilisation, (cost.kernels + kernels) * gpu.launch
        compute += times * busy
        launches += times * (max(started - busy, 0.0) + waits * gpu.wait)

    if stacked:
        add(1, work.stacked, 0, 0, 1)
    else:
        solves = (
            (work.f_solver, work.f_evals, work.forward),
            (work.b_solver, work.b_evals, work.backward),
        )
        for which, (solver, most, cost) in enumerate(solves):
            times = most * measured.evaluations(which, n)
            nfe = max(round(times), 1)
            traffic = least_bytes(solver, nfe, share * work.state * _ELEMENT) / nfe
            add(times, cost, work.solver_kernels[which], traffic, 1)
        add(1, work.rest, 0, 0, 1)
        add(work.jac_share, work.jacobian, 0, 0, 0)
    return Step(compute, launches, *_sums(work, n, gpu))


def _sums(work: Work, n: int, gpu: Hardware) -> tuple[float, float]:
    """Seconds to sum the gradients in a ring, and of the hops of all collectives in a tree."""
    if n == 1:
        return 0.0, 0.0
    link = gpu.near if n <= gpu.per_machine else gpu.far
    transfer = 2 * (n - 1) / n * work.gradient_bytes / link
    return transfer, work.collectives * math.ceil(math.log2(n)) * gpu.latency


def run_hours(work: Work, n: int, kind: str, gpu: Hardware, measured: Measured) -> float:
    """GPU hours of the whole published run, its batch shared by n GPUs."""
    share = math.ceil(work.batch / n)
    phases = ((work.stacked_steps, True), (work.steps - work.stacked_steps, False))
    seconds = sum(
        steps * step_on(work, n, share, kind, gpu, measured, stacked).seconds
        for steps, stacked in phases
    )
    return n * seconds / 3600


def efficiency(work: Work, n: int, kind: str, gpu: Hardware, measured: Measured) -> float:
    """t(1) / (n t(n)) of an equilibrium step with the published batch."""
    alone, shared = (
        step_on(work, k, math.ceil(work.batch / k), kind, gpu, measured, False).seconds
        for k in (1, n)
    )
    return alone / (n * shared)


def useful(work: Work, kind: str, gpu: Hardware, measured: Measured) -> int:
    """The most GPUs that share the published batch at an efficiency of a half or more."""
    counts = range(1, work.batch + 1)
    return max(n for n in counts if efficiency(work, n, kind, gpu, measured) >= 0.5)


def utilisation_of(record: dict) -> float:
    """The floor of a step over its time, from a record of bench_train.py; its fast form."""
    fast = record["forms"]["fast"]
    return fast["floor"] / fast["step"]


def filled_of(record: dict, work: Work) -> tuple[float, float]:
    """Evaluations over those of solves that run to their thresholds, from such a record."""
    fast = record["forms"]["fast"]
    # Of a backward solve the first evaluation, at zero, is known.
    shares = fast["f_nfe"] / work.f_evals, (fast["b_nfe"] - 1) / work.b_evals
    return tuple(min(share, 1.0) for share in shares)


def spread_of(record: dict) -> tuple[list[float], list[float]]:
    """Evaluations over their mean, from a record of bench_scaling.py: of all processes and steps of
    the arrangement in which they share a batch."""
    each = record["phases"]["equilibrium"]["strong"]["each"]
    nfe = [step for process in each for step in process["nfe"]]
    means = [mean(step[i] for step in nfe) for i in (0, 1)]
    return tuple([step[i] / means[i] for step in nfe] for i in (0, 1))
