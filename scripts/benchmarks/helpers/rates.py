"""Seconds and memory of the training steps of a published setting on one GPU, by phase.

Every solve runs to its threshold, so that a step has as many evaluations on every machine. With
bfloat16 all evaluations are in bfloat16; a run finishes solves in float32 where the tolerance asks
for it.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from helpers.measure import synchronize
from helpers.settings import FORMS, PUBLISHED_GPUS, Options, image_config, language_arguments
from helpers.settings import LANGUAGE as WORDS
from helpers.steps import run_step
from helpers.tasks import LanguageTask, Task, make_task
from lib.solvers import SOLVERS
from lib.solvers.precision import allow_tf32

# Number formats: TF32 allowed or not, and the form whose autocast f has.
FORMATS = {"f32": (False, "fast"), "bf16": (False, "fast-bf16"), "tf32": (True, "fast")}
PHASES = ("stacked", "equilibrium", "jacobian")  # the last: with the Jacobian loss
_WARMUP = {"stacked": 2, "equilibrium": 1, "jacobian": 1}  # the memory of words must be full


@dataclass
class Phase:
    """Medians over the steps of one phase; the solves are a part of the step."""

    seconds: float  # of a step
    steps: int  # measured
    forward_solve: float = 0.0  # seconds, like the next
    backward_solve: float = 0.0
    f_evaluations: int = 0
    b_evaluations: int = 0  # the first product, with zero, is known and not among them
    peak_bytes: int = 0  # of tensors; 0 on a CPU


@dataclass
class _Clock:
    """Solvers that run to their thresholds, and the seconds that they take."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})

    def solver(self, method: str, which: str) -> Callable:
        # Without a keyword ``floor``, a solve under autocast has one stage.
        def solve(f, x0: Tensor, threshold: int, stop_mode: str = "rel") -> dict:
            synchronize(self.device)
            start = time.perf_counter()
            found = SOLVERS[method](f, x0, threshold=threshold, eps=0.0, stop_mode=stop_mode)
            synchronize(self.device)
            self.seconds[which] += time.perf_counter() - start
            return found

        return solve


def published_share(name: str, options: Options, gpus: int = PUBLISHED_GPUS) -> int:
    """Samples of the published batch on each of ``gpus`` GPUs."""
    if name in WORDS:
        return PUBLISHED_GPUS * language_arguments(name, options).batch_size // gpus
    cfg = image_config(name, options)
    return max(cfg.TRAIN.BATCH_SIZE_PER_GPU * len(cfg.GPUS) // gpus, 1)


def measure(
    name: str,
    options: Options,
    formats: list[str],
    steps: int,
    deadline: float,
    found: Callable[[str, str, dict], None],
) -> Task:
    """Measure a setting; call ``found(format, phase, figures)`` for each phase that was measured.

    Ends early at ``deadline`` (of time.monotonic). A phase that does not fit in memory has the
    figure ``error``.
    """
    task = make_task(name, FORMS["fast"], options)
    torch.backends.cudnn.benchmark = name not in WORDS  # as the trainers set it
    clock = _Clock(options.device)
    task.model.f_solver = clock.solver(task.methods[0], "forward")
    task.model.b_solver = clock.solver(task.methods[1], "backward")
    border = task.args.pretrain_steps if isinstance(task, LanguageTask) else _border(task)
    for kind in formats:
        tf32, form = FORMATS[kind]
        allow_tf32(tf32)
        task.form = FORMS[form]
        for phase in PHASES:
            if (phase == "stacked" and border == 0) or (phase == "jacobian" and not _jac(task)):
                continue
            if time.monotonic() > deadline:
                return task
            try:
                one = _phase(task, phase, steps, deadline, clock)
            except torch.OutOfMemoryError:
                found(kind, phase, {"error": "does not fit in memory"})
            else:
                if one is not None:
                    found(kind, phase, asdict(one))
            task.optimizer.zero_grad(set_to_none=True)
            _release(options.device)
    return task


def _border(task: Task) -> int:
    return task.cfg.TRAIN.PRETRAIN_STEPS


def _jac(task: Task) -> bool:
    """Whether the equilibrium phase of the setting has a Jacobian loss."""
    if isinstance(task, LanguageTask):
        return task.args.jac_loss_weight > 0 and task.args.jac_loss_freq > 0
    loss = task.cfg.LOSS
    return loss.JAC_LOSS_WEIGHT > 0 and loss.JAC_LOSS_FREQ > 0 and loss.JAC_STOP_EPOCH > 0


def _phase(task: Task, phase: str, steps: int, deadline: float, clock: _Clock) -> Phase | None:
    """Steps of one phase; None if not one could be measured in time."""
    device, rows = task.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for index in range(_WARMUP[phase] + steps):
        if time.monotonic() > deadline:
            break
        before = dict(clock.seconds)
        seconds = _step(task, phase)
        if index >= _WARMUP[phase]:
            solves = [clock.seconds[which] - before[which] for which in clock.seconds]
            rows.append([seconds, *solves])
    if not rows:
        return None
    seconds, forward, backward = (statistics.median(column) for column in zip(*rows, strict=True))
    one = Phase(seconds, len(rows), forward, backward)
    if phase != "stacked":
        stats = task.model.deq.stats
        one.f_evaluations = stats.forward.last["nfe"]
        one.b_evaluations = stats.backward.last["nfe"] - 1
    if device.type == "cuda":
        one.peak_bytes = torch.cuda.max_memory_allocated()
    return one


def _step(task: Task, phase: str) -> float:
    """One training step of the phase; its seconds. The data is made before."""
    begin = task.begin

    def chosen(index: int) -> None:
        begin(index)
        task.with_jac = phase == "jacobian"
        if isinstance(task, LanguageTask):
            task.f_thres = task.args.f_thres
        else:
            task.f_thres = task.cfg.DEQ.F_THRES

    task.begin = chosen
    try:
        parts, _ = run_step(task, -1 if phase == "stacked" else 0)
    finally:
        task.begin = begin
    return sum(parts)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
