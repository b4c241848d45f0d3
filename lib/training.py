"""What every trainer needs around its steps: random states, solver figures, refusal, exit code."""

import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lib.distributed import Processes, end_at_once, lost_contact
from lib.errors import DEQWarning, InputError
from lib.experiment import CHECKPOINT
from lib.solver_stats import PassStats, SolverStats
from lib.stopping import Stopped

PASSES = ("forward", "backward")


class TrainingError(RuntimeError):
    """Training cannot go on: the message says why, and where the last good state is."""


def exit_code(program: str, action: Callable[[], object], resume: str) -> int:
    """Run ``action``; bad input is one line on the error stream and 2, without a traceback.

    One of several processes ends here, at once.

    Args:
        program: the command's name, which begins the line.
        action: what the command does.
        resume: what continues an interrupted run, such as '--restart'.
    """
    try:
        action()
    except (Exception, KeyboardInterrupt) as error:
        found = _explanation(error, resume)
        if found is None:  # a mistake of our own
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            end_at_once(1)
        line, code = found
        print(f"{program}: {' '.join(line.split())}", file=sys.stderr)
        end_at_once(code)
        return code
    end_at_once(0)
    return 0


def _explanation(error: BaseException, resume: str) -> tuple[str, int] | None:
    """The line and the exit code of an error that a run has to expect."""
    match error:
        case InputError() | OSError():  # no permission, no space: the message names the file
            return str(error), 2
        case TrainingError():
            return str(error), 1
        case Stopped():
            return f"{error} ({resume} continues the run)", error.code
        case KeyboardInterrupt():
            return f"interrupted ({resume} continues the run)", 130
    if lost := lost_contact(error):
        way_out = f"start all of them again, {resume} continues the run"
        return f"lost the other processes ({lost}): {way_out}", 1
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[SolverStats]:
    """Evaluation mode with solver statistics of its own; the model's are put back afterwards."""
    was_training, stats = model.training, model.deq.stats
    try:
        model.eval()
        model.deq.stats = SolverStats()
        with torch.no_grad():
            yield model.deq.stats
    finally:
        model.deq.stats = stats
        model.train(was_training)


@contextmanager
def warnings_in(log: Callable[[str], None]) -> Iterator[None]:
    """Within, what is warned of a solve is a line of the log: the same words once.

    That of a forward solve which stopped early is left out: the log has its residuals.
    """
    said, show = set(), warnings.showwarning

    def logged(message, category, *where) -> None:
        if not issubclass(category, DEQWarning):
            show(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            log(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", DEQWarning)
        warnings.filterwarnings("ignore", "a forward solve", DEQWarning)
        warnings.showwarning = logged
        yield


class EvaluationStopped(Exception):
    """An evaluation was broken off, in all processes, because the run is to stop."""


def random_states(rng: random.Random, gpus: Sequence[int]) -> dict:
    """The states of all generators that a step draws from, for a checkpoint.

    Args:
        rng: of the choices of a step.
        gpus: numbers of the GPUs that this process computes on; none on the CPU.
    """
    return {
        "random": rng.getstate(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def restore_random_states(state: dict, rng: random.Random, gpus: Sequence[int]) -> list[str]:
    """Put back what :func:`random_states` returned, as far as the GPUs are as many as they were.

    Returns:
        What cannot be as it was, in words: a line or none.
    """
    rng.setstate(state["random"])
    torch.set_rng_state(state["torch_random"])
    saved = state["cuda_random"]
    for gpu, gpu_state in zip(gpus, saved, strict=False):
        torch.cuda.set_rng_state(gpu_state, gpu)
    if len(saved) == len(gpus):
        return []
    here, before = (f"{len(found)} GPU(s)" if found else "the CPU" for found in (gpus, saved))
    return [
        f"{here} continue(s) what {before} began, so the run is not bit for bit what it would have "
        "been: some dropout masks come from new streams, and rounding differs"
    ]


def stats_state(stats: SolverStats) -> list[dict]:
    """Solver statistics as plain containers, for a checkpoint."""
    return [asdict(stats.forward), asdict(stats.backward)]


def restore_stats(state: list[dict], stats: SolverStats) -> None:
    """Put back what :func:`stats_state` returned."""
    forward, backward = state
    stats.forward, stats.backward = PassStats(**forward), PassStats(**backward)


def summed_stats(stats: SolverStats, processes: Processes) -> SolverStats:
    """The statistics of all processes together; every process has to ask."""
    table = [
        [s.solves, s.nfe, s.broken, s.abs_residual, s.rel_residual]
        for s in (stats.forward, stats.backward)
    ]
    sums = processes.sum(torch.tensor(table, dtype=torch.float64)).tolist()
    return SolverStats(
        *(
            PassStats(int(n), int(nfe), absolute, relative, int(broken))
            for n, nfe, broken, absolute, relative in sums
        )
    )


def solver_figures(stats: SolverStats) -> tuple[dict[str, float], str]:
    """Means of both passes since the last reset: values for metrics, and words for the log."""
    values, text = {}, ""
    for which in PASSES:
        passed: PassStats = getattr(stats, which)
        if passed.solves:
            means = passed.means()
            values |= {f"{which}_{name}": value for name, value in means.items()}
            text += f" | {which[0]} res {means['rel_residual']:.2e} nfe {means['nfe']:.1f}"
            text += f" broken {means['broken']}" if means["broken"] else ""
    return values, text


def check_checkpoint(state, number: int, parts: set[str], source: Path) -> None:
    """Refuse a checkpoint of another format, or one that lacks parts.

    Args:
        state: what was read.
        number: of the format that this trainer saves.
        parts: names of the entries that it has to have.
        source: the file, for the message.
    """
    if not isinstance(state, dict) or state.get("format") != number:
        raise InputError(f"{source} is not a checkpoint of this trainer: give its {CHECKPOINT}")
    if missing := sorted(parts - state.keys()):
        raise InputError(f"{source} lacks {', '.join(missing)}: it is not whole, use another")


def fused_if_possible(
    kind: type[torch.optim.Optimizer], model: nn.Module, **options
) -> torch.optim.Optimizer:
    """An optimiser of all parameters: one kernel for the whole update, where PyTorch has that for
    their device (Adam at 29 million parameters, one CPU thread: 14 ms instead of 119)."""
    parameters = list(model.parameters())
    groups = _groups(parameters)
    # Whether it has is found out by doing one update.
    probe = nn.Parameter(parameters[0].detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=0.1, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; not on this device
        return kind(groups, **options)
    return kind(groups, fused=True, **options)


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Parameter groups in which no two parameters are the same numbers.

    An optimiser updates groups one after the other. Within a group one kernel may update all
    parameters at once, and of two updates of the same numbers one would be lost.
    """
    groups: list[dict] = []
    seen: Counter = Counter()
    for parameter in parameters:
        place = parameter.untyped_storage()._cdata, parameter.storage_offset()
        if seen[place] == len(groups):
            groups.append({"params": []})
        groups[seen[place]]["params"].append(parameter)
        seen[place] += 1
    return groups


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, weight_decay: float) -> None:
    """Load an optimiser's state; the weight decay is the setting's, as the rate will be, and
    whether updates are fused is a matter of this machine, not of the one that saved the state."""
    own = {name: optimizer.defaults[name] for name in ("fused",) if name in optimizer.defaults}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group |= own | {"weight_decay": weight_decay}
