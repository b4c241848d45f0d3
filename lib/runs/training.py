"""What every trainer uses: exit codes, random states, statistics, checkpoint checks, optimisers."""

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

from lib.errors import DEQWarning, InputError
from lib.runs.interrupts import Stopped
from lib.runs.processes import Processes, end_at_once, lost_contact
from lib.runs.run_folder import CHECKPOINT
from lib.solvers.stats import PassStats, SolverStats

PASSES = ("forward", "backward")


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and where the last good state is."""


def exit_code(program: str, action: Callable[[], object], resume: str) -> int:
    """Run ``action`` and return the exit code.

    An expected error is one line on stderr, without a traceback. Bad input or a file error gives
    code 2, failed training or a lost process 1, :class:`Stopped` its own code, and an interrupt
    130. Any other error is raised. With several processes this function does not return: it ends
    the process by :func:`end_at_once`.

    Args:
        program: the command's name, at the beginning of the line.
        action: what the command does.
        resume: the option that continues an interrupted run, such as '--restart'.
    """
    try:
        action()
    except (Exception, KeyboardInterrupt) as error:
        found = _explanation(error, resume)
        if found is None:  # a bug: show the traceback
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
    """The message and the exit code of an expected error; None for any other error."""
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
    """Evaluate within a ``with`` block: eval mode, no gradients, separate solver statistics.

    Yields the statistics of the block. The model's own mode and statistics are restored at its
    end.
    """
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
    """Within a ``with`` block, write each DEQWarning to the log, every distinct message once.

    Warnings about unsolved forward passes are left out, as the log has their residuals.
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
    """All processes interrupted an evaluation because the run should stop."""


def random_states(rng: random.Random, gpus: Sequence[int]) -> dict:
    """The states of all random generators that a step uses, for a checkpoint.

    Args:
        rng: the generator of :meth:`~lib.runs.steps.Stepper.draw`.
        gpus: numbers of the GPUs that this process computes on; empty on the CPU.
    """
    return {
        "random": rng.getstate(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def restore_random_states(state: dict, rng: random.Random, gpus: Sequence[int]) -> list[str]:
    """Restore what :func:`random_states` returned, for the GPUs that exist both then and now.

    Returns:
        One log line if the number of GPUs differs, else none.
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
    """Restore what :func:`stats_state` returned."""
    forward, backward = state
    stats.forward, stats.backward = PassStats(**forward), PassStats(**backward)


def summed_stats(stats: SolverStats, processes: Processes) -> SolverStats:
    """Solver statistics summed over all processes. A collective call: every process makes it."""
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
    """Means of both passes since the last reset, as metrics values and as text for the log."""
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
    """Raise an InputError for a checkpoint of another format, or one with missing entries.

    Args:
        state: the content of the file.
        number: the format number that this trainer saves.
        parts: names of the required entries.
        source: the file, for the message.
    """
    if not isinstance(state, dict) or state.get("format") != number:
        raise InputError(f"{source} is not a checkpoint of this trainer: give its {CHECKPOINT}")
    if missing := sorted(parts - state.keys()):
        raise InputError(f"{source} lacks {', '.join(missing)}: it is not whole, use another")


def fused_if_possible(
    kind: type[torch.optim.Optimizer], model: nn.Module, **options
) -> torch.optim.Optimizer:
    """Build an optimiser of all parameters, fused if PyTorch supports this on their device.

    A fused optimiser does the whole update in one kernel (Adam, 29 million parameters, one CPU
    thread: 14 ms instead of 119).
    """
    parameters = list(model.parameters())
    groups = _groups(parameters)
    # A trial update finds out whether fused updates are supported.
    probe = nn.Parameter(parameters[0].detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=0.1, fused=True).step()
    except (TypeError, RuntimeError):  # no such argument; not on this device
        return kind(groups, **options)
    return kind(groups, fused=True, **options)


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Split parameters into groups; no two parameters of a group share the same memory.

    An optimiser updates groups one after another, but one kernel may update all parameters of a
    group at once. Of two simultaneous updates of the same memory one would be lost.
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
    """Load an optimiser's state, except for two options.

    The weight decay is the argument, because settings may change on a resume. ``fused`` stays as
    this optimiser has it, because it depends on this machine, not on the one that saved.
    """
    own = {name: optimizer.defaults[name] for name in ("fused",) if name in optimizer.defaults}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group |= own | {"weight_decay": weight_decay}
