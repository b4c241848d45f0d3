"""The plan of a run: what is counted, and hours from the rates that were measured."""

import math
from dataclasses import dataclass

from lib.errors import InputError
from planner.counting import Flops, Memory, count_flops, count_memory, evaluations
from planner.gpus import GPU, find_gpu
from planner.hours import Step, step_on
from planner.runs import Run


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
    transfer: float  # seconds to sum the gradients over all GPUs, after each step

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
    def fits(self) -> bool:
        """Whether the GPU has the memory that was counted, or measured where it was."""
        measured = self.step.peaks.values() if self.step is not None else ()
        return max([*self.memory.peaks.values(), *measured]) <= self.gpu.memory

    @property
    def hours(self) -> tuple[float, float]:
        """Of the stacked and of the equilibrium phase."""
        step = self.step
        return (
            self.run.stacked_steps * (step.stacked + self.transfer) / 3600,
            self.equilibrium_steps * (step.equilibrium + self.transfer) / 3600,
        )


def make_plan(run: Run, gpus: int, gpu_name: str, number_format: str) -> Plan:
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
    counts = evaluations(run, flops)
    share = math.ceil(run.batch / gpus)
    memory = count_memory(run, math.ceil(share / run.chunks))
    step = step_on(run, flops, counts, share, number_format, gpu_name)
    # In a ring every gradient goes around twice.
    transfer = 2 * (gpus - 1) / gpus * memory.gradients / gpu.link
    return Plan(run, gpus, gpu, number_format, parameters, flops, *counts, memory, step, transfer)
