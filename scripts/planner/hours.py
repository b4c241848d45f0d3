"""Seconds of a step on a GPU, from the steps that scripts/benchmarks/gpu_rates.py measured."""

from dataclasses import dataclass
from functools import cache

from planner.counting import EQUILIBRIUM, JACOBIAN, STACKED, Flops, count_flops, phases
from planner.gpus import GPUS, MEASURED, measured_rates
from planner.runs import EXPERIMENTS, WORDS, Run, find_run

# What stands in for a model that was not measured, from small to large: the first of these that
# was, or a larger one for an evaluation of more than twice its FLOPs.
_STAND_INS = {
    "words": ("wt103_deq_transformer_reg",),
    "segments": ("cityscapes/seg_mdeq_SMALL", "cityscapes/seg_mdeq_LARGE"),
    "classes": ("cifar/cls_mdeq_TINY", "imagenet/cls_mdeq_SMALL", "imagenet/cls_mdeq_XL"),
}
_LARGE = 2
_SMALL = 0.5  # share of the measured FLOPs of an evaluation below which that is said
_SAME = 1e-6  # relative difference of FLOPs below which two models are the same
_MEASURED = {STACKED: "stacked", EQUILIBRIUM: "equilibrium", JACOBIAN: "jacobian"}  # in the file


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one GPU, by phase: 'stacked', and 'equilibrium' (the mean over steps
    with and without the Jacobian loss); and the parts of the latter."""

    stacked: float
    equilibrium: float
    parts: dict[str, float]
    basis: str  # where the rates are from
    measured: bool  # of this model, its solves, batch, number format and GPU
    phases: dict[str, dict]  # what was measured of each phase of the run, if it is
    jacobian: float  # seconds more of a step with the Jacobian loss
    too_low: bool  # so small an evaluation waits for its kernels to start

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes that were measured, by phase."""
        return {name: phase["peak_bytes"] for name, phase in self.phases.items()}


@dataclass(frozen=True)
class _Rates:
    """What was measured of a setting in one number format."""

    setting: str
    batch: int
    phases: dict[str, dict]
    gpu: str

    def seconds(self, phase: str) -> float | None:
        """Seconds of a step of the phase; None if it was not measured, or does not fit."""
        return self.phases.get(phase, {}).get("seconds")


def step_on(
    run: Run,
    flops: Flops,
    evaluations: tuple[float, float],
    share: int,
    number_format: str,
    gpu_name: str,
) -> Step | None:
    """A step with ``share`` samples and these evaluations of f and products with its Jacobian.

    None if nothing was measured from which to estimate it.
    """
    rates = _rates(run, number_format, share * flops.forward)
    if rates is None:
        return None
    own = rates.setting == run.published and not run.changed
    base = flops if own else _counted(rates.setting)
    its = run if own else _published(rates.setting)
    here, there = (GPUS[name].peak[number_format] for name in (MEASURED, gpu_name))
    per_sample = here / there * share / rates.batch

    def scaled(seconds: float, ours: float, theirs: float) -> float:
        """At as many FLOP/s as were measured."""
        return per_sample * seconds * ours / theirs

    one = rates.phases["equilibrium"]
    solves = one["forward_solve"], one["backward_solve"]
    each = [
        scaled(seconds / max(count, 1), getattr(flops, which), getattr(base, which))
        for seconds, count, which in zip(
            solves,
            (one["f_evaluations"], one["b_evaluations"]),
            ("forward", "backward"),
            strict=True,
        )
    ]
    rest = scaled(one["seconds"] - sum(solves), flops.rest, base.rest)
    parts = {
        "forward solve": evaluations[0] * each[0],
        "backward solve": evaluations[1] * each[1],
        "rest": rest,
    }

    def other(phase: str, name: str, before: float = 0.0) -> float:
        """Seconds of what only some steps have; at the rate of the rest if not measured."""
        ours, theirs, seconds = getattr(flops, name), getattr(base, name), rates.seconds(phase)
        if seconds is None or not theirs:
            return rest * ours / flops.rest
        return scaled(max(seconds - before, 0.0), ours, theirs)

    jacobian = other("jacobian", "jacobian", one["seconds"]) if run.jac_share else 0.0
    if run.jac_share:
        parts["Jacobian loss"] = run.jac_share * jacobian
    names = {phase: _MEASURED[phase] for phase in phases(run)}
    pairs = ((getattr(flops, k), getattr(base, k)) for k in ("forward", "backward", "rest"))
    measured = (
        all(abs(ours - theirs) <= _SAME * theirs for ours, theirs in pairs)
        and (share, run.chunks, gpu_name) == (rates.batch, 1, MEASURED)
        and _solves(run) == _solves(its)
        and all(rates.seconds(name) is not None for name in names.values())
    )
    return Step(
        stacked=other("stacked", "stacked") if run.border else 0.0,
        equilibrium=sum(parts.values()),
        parts=parts,
        basis=f"{rates.setting} at {rates.batch} samples on {rates.gpu}",
        measured=measured,
        phases={k: rates.phases[name] for k, name in names.items()} if measured else {},
        jacobian=jacobian,
        too_low=share * flops.forward < _SMALL * rates.batch * base.forward,
    )


def _rates(run: Run, number_format: str, work: float) -> _Rates | None:
    """What was measured of the run's setting, or of a stand-in for evaluations of this work."""
    if own := _measured(run.published, number_format):
        return own
    kind = "words" if run.words else "segments" if run.segments else "classes"
    found = None
    for setting in _STAND_INS[kind]:
        if found and work <= _LARGE * found.batch * _counted(found.setting).forward:
            break
        found = _measured(setting, number_format) or found
    return found


def _measured(setting: str | None, number_format: str) -> _Rates | None:
    found = measured_rates()
    record = found["settings"].get(setting, {})
    phases = record.get("formats", {}).get(number_format, {})
    if "seconds" not in phases.get("equilibrium", {}):
        return None
    return _Rates(setting, record["batch"], phases, found["gpu"])


def _solves(run: Run) -> tuple:
    """What the time of a solve and its memory depend on, beside the model."""
    return run.solvers, run.grad, run.drawn_thresholds, run.thresholds[1]


@cache
def _published(setting: str) -> Run:
    path = EXPERIMENTS / f"{setting}.yaml" if "/" in setting else WORDS / f"{setting}.sh"
    return find_run(str(path), [])


@cache
def _counted(setting: str) -> Flops:
    """The FLOPs of a published setting."""
    return count_flops(_published(setting))[0]
