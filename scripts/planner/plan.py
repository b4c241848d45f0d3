"""The plan of a run: what is counted, and hours from the rates that were measured."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lib.errors import InputError
from planner.counting import Flops, Memory, count_flops, count_memory, evaluations
from planner.gpus import GPU, MEASURED, RATES, find_gpu, measured_rates
from planner.runs import EXPERIMENTS, WORDS, Run, find_run

# What stands in for a model that was not measured: the first of these that was.
_STAND_INS = {
    "words": ("wt103_deq_transformer_reg",),
    "segments": ("cityscapes/seg_mdeq_SMALL",),
    "classes": ("cifar/cls_mdeq_TINY", "imagenet/cls_mdeq_SMALL"),
}
_SAME = 1e-6  # relative difference of FLOPs below which two models are the same


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one GPU, by phase: 'stacked', 'equilibrium' (the mean over steps with
    and without the Jacobian loss); and the parts of the latter."""

    stacked: float
    equilibrium: float
    parts: dict[str, float]
    transfer: float  # to sum gradients over GPUs, after each of them
    basis: str  # where the rates are from
    measured: bool  # of this model, batch, number format and GPU
    peaks: dict[str, int]  # bytes that were measured, by phase, if it is


@dataclass(frozen=True)
class Plan:
    run: Run
    gpus: int
    gpu: GPU
    number_format: str
    parameters: int
    flops: Flops
    f_evals: float
    b_evals: float
    memory: Memory
    step: Step | None  # None: nothing was measured in this number format

    @property
    def share(self) -> int:
        """Samples of a step on the GPU that has most."""
        return math.ceil(self.run.batch / self.gpus)

    @property
    def together(self) -> int:
        """Samples that go through the model at once."""
        return math.ceil(self.share / self.run.chunks)

    @property
    def equilibrium_steps(self) -> int:
        return self.run.steps - self.run.stacked_steps

    @property
    def step_flops(self) -> float:
        """Of a step at equilibrium, per sample."""
        return sum(self.step_parts.values())

    @property
    def step_parts(self) -> dict[str, float]:
        f = self.flops
        return {
            "forward solve": self.f_evals * f.forward,
            "backward solve": self.b_evals * f.backward,
            "rest": f.rest,
            "Jacobian loss": self.run.jac_share * f.jacobian,
        }

    @property
    def total_flops(self) -> float:
        each = self.run.stacked_steps * self.flops.stacked
        return self.run.batch * (each + self.equilibrium_steps * self.step_flops)

    @property
    def hours(self) -> tuple[float, float]:
        """Of the stacked and of the equilibrium phase."""
        step = self.step
        return (
            self.run.stacked_steps * (step.stacked + step.transfer) / 3600,
            self.equilibrium_steps * (step.equilibrium + step.transfer) / 3600,
        )


def make_plan(run: Run, gpus: int, gpu_name: str, number_format: str, rates: Path = RATES) -> Plan:
    """Count a run and estimate its hours.

    Raises:
        InputError: more GPUs than samples, or an unknown GPU or number format.
    """
    gpu = find_gpu(gpu_name, number_format)
    if gpus * run.chunks > run.batch:
        raise InputError(
            f"--gpus {gpus} cannot share a batch of {run.batch} in {run.chunks} part(s): lower it"
        )
    flops, parameters = count_flops(run)
    f_evals, b_evals = evaluations(run, flops)
    share = math.ceil(run.batch / gpus)
    memory = count_memory(run, math.ceil(share / run.chunks))
    step = _step(run, flops, (f_evals, b_evals), share, number_format, gpu_name, rates)
    if step is not None and gpus > 1:
        # A ring: every gradient goes around twice.
        seconds = 2 * (gpus - 1) / gpus * memory.gradients / gpu.link
        step = replace(step, transfer=seconds)
    return Plan(run, gpus, gpu, number_format, parameters, flops, f_evals, b_evals, memory, step)


@cache
def _counted(setting: str) -> tuple[Run, Flops]:
    run = find_run(str(_file_of(setting)), [])
    return run, count_flops(run)[0]


def _file_of(setting: str) -> Path:
    return EXPERIMENTS / f"{setting}.yaml" if "/" in setting else WORDS / f"{setting}.sh"


def _formats(settings: dict, setting: str | None) -> dict:
    """What was measured of a setting, by number format."""
    return settings.get(setting, {}).get("formats", {})


def _step(
    run: Run,
    flops: Flops,
    evals: tuple[float, float],
    share: int,
    number_format: str,
    gpu_name: str,
    path: Path,
) -> Step | None:
    found = measured_rates(path)
    settings = found["settings"]
    kind = "words" if run.words else "segments" if run.segments else "classes"
    known = (run.published, *_STAND_INS[kind])
    setting = next((s for s in known if number_format in _formats(settings, s)), None)
    phases = _formats(settings, setting).get(number_format, {})
    one = phases.get("equilibrium", {})
    if "seconds" not in one:
        return None
    batch = settings[setting]["batch"]
    _, base = _counted(setting)
    slower = 1.0
    if gpu_name != MEASURED:
        here, there = find_gpu(MEASURED, number_format), find_gpu(gpu_name, number_format)
        slower = here.peak[number_format] / there.peak[number_format]

    def scaled(seconds: float, ours: float, theirs: float) -> float:
        """Of as many FLOPs per second; the number of samples may differ."""
        return slower * seconds * (share * ours) / (batch * theirs) if theirs else 0.0

    parts = {
        "forward solve": evals[0]
        * scaled(one["forward_solve"] / one["f_evaluations"], flops.forward, base.forward),
        "backward solve": evals[1]
        * scaled(one["backward_solve"] / max(one["b_evaluations"], 1), flops.backward,
                 base.backward),
        "rest": scaled(
            one["seconds"] - one["forward_solve"] - one["backward_solve"], flops.rest, base.rest
        ),
    }  # fmt: skip
    jacobian = phases.get("jacobian", {})
    if run.jac_share:
        if "seconds" in jacobian:
            extra = max(jacobian["seconds"] - one["seconds"], 0.0)
            extra = scaled(extra, flops.jacobian, base.jacobian)
        else:  # at the rate of the rest
            extra = parts["rest"] * flops.jacobian / flops.rest
        parts["Jacobian loss"] = run.jac_share * extra
    first = phases.get("stacked", {})
    stacked = 0.0
    if run.border:
        if "seconds" in first and base.stacked:
            stacked = scaled(first["seconds"], flops.stacked, base.stacked)
        else:
            stacked = parts["rest"] * flops.stacked / flops.rest
    pairs = ((getattr(flops, k), getattr(base, k)) for k in ("forward", "backward", "rest"))
    same = all(abs(ours - theirs) <= _SAME * theirs for ours, theirs in pairs)
    complete = "seconds" in first or not run.border
    measured = same and share == batch and gpu_name == MEASURED and complete and run.chunks == 1
    peaks = {name: phase["peak_bytes"] for name, phase in phases.items() if "peak_bytes" in phase}
    basis = f"{setting} at {batch} samples on {found['gpu']}"
    return Step(
        stacked, sum(parts.values()), parts, 0.0, basis, measured, peaks if measured else {}
    )
