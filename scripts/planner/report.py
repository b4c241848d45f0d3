"""The text and the JSON of a plan."""

from collections.abc import Sequence
from itertools import zip_longest

from planner.plan import Plan

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def report(plan: Plan) -> str:
    """The plan as lines for a person."""
    run, sections = plan.run, []
    sample = (
        f"sequence of {run.units} tokens" if run.words else "image {} x {}".format(*run.image_size)
    )
    share = f"{plan.share} on each of {plan.gpus}" if plan.gpus > 1 else "all on one"
    sections.append(
        f"{run.name}: batch {run.batch} ({share}), {plan.gpu.title}, {plan.number_format}\n"
        f"counted for one {sample}, with solves that run to their thresholds"
    )
    f = plan.flops
    sections.append(
        _table(
            "model",
            [
                ("parameters", f"{plan.parameters:,}"),
                ("one evaluation of f", f"{_flops(f.forward)}"),
                ("one product with its Jacobian", f"{_flops(f.backward)}"),
                ("once per forward pass", f"{_flops(f.once)}"),
            ],
        )
    )
    parts = plan.step_parts
    forward, backward = run.solvers
    rows = [
        (
            f"forward solve ({forward})",
            f"{plan.f_evals:.4g} evaluations",
            _flops(parts["forward solve"]),
        ),
        (
            f"backward solve ({backward})" if plan.b_evals else f"gradient {run.grad}",
            f"{plan.b_evals:.4g} products" if plan.b_evals else "no solve",
            _flops(parts["backward solve"]),
        ),
        ("rest, with the last evaluation", "", _flops(parts["rest"])),
    ]
    if run.jac_share:
        share_ = f"in {100 * run.jac_share:.3g} % of steps"
        rows.append(("Jacobian loss", share_, _flops(parts["Jacobian loss"])))
    rows.append(("a step at equilibrium", "", _flops(plan.step_flops)))
    if run.border:
        layers = run.settings.n_layer if run.words else run.settings.MODEL.NUM_LAYERS
        rows.append(("a stacked step", f"{layers} evaluations", _flops(f.stacked)))
    sections.append(_table("a step", rows))
    memory = _table(f"memory of a GPU (float32, {plan.together} at once)", _memory(plan))
    if not plan.fits:
        memory += "\n  DOES NOT FIT: take more GPUs or more parts of the batch."
    sections.append(memory)
    sections.append(_table("run", _totals(plan)))
    sections.append(_time(plan))
    return "\n\n".join(sections)


def as_dict(plan: Plan) -> dict:
    """All figures of the plan: FLOPs per sample, bytes, seconds, hours."""
    run, step = plan.run, plan.step
    found = {
        "run": run.name,
        "gpus": plan.gpus,
        "gpu": plan.gpu.title,
        "format": plan.number_format,
        "parameters": plan.parameters,
        "batch": run.batch,
        "samples_per_gpu": plan.share,
        "flops": vars(plan.flops),
        "evaluations": {"forward": plan.f_evals, "backward": plan.b_evals},
        "step_flops": plan.step_parts,
        "memory_bytes": vars(plan.memory),
        "gpu_memory_bytes": plan.gpu.memory,
        "fits": plan.fits,
        "steps": {"stacked": run.stacked_steps, "equilibrium": plan.equilibrium_steps},
        f"{run.unit}s": run.steps * run.batch * run.units,
        "epochs": _epochs(plan),
        "total_flops": plan.total_flops,
        "time": None,
    }
    if step is not None:
        stacked, equilibrium = plan.hours
        found["time"] = {
            **vars(step),
            "transfer": plan.transfer,
            "hours": {"stacked": stacked, "equilibrium": equilibrium},
        }
    return found


def _memory(plan: Plan) -> list[tuple[str, ...]]:
    memory = plan.memory
    rows = [
        ("weights and buffers", _bytes(memory.weights)),
        ("gradients", _bytes(memory.gradients)),
        ("optimiser", _bytes(memory.optimizer)),
        ("batch and memory of the text" if plan.run.words else "batch", _bytes(memory.data)),
        ("history of a solver", _bytes(memory.solver)),
    ]
    rows += [(f"kept for backward, {k}", _bytes(v)) for k, v in memory.kept.items()]
    rows += [(f"peak, {k}", _bytes(v)) for k, v in memory.peaks.items()]
    measured = plan.step.peaks if plan.step is not None else {}
    rows += [(f"measured peak, {k}", _bytes(v)) for k, v in measured.items()]
    return [*rows, (f"memory of {plan.gpu.title}", _bytes(plan.gpu.memory))]


def _totals(plan: Plan) -> list[tuple[str, ...]]:
    run = plan.run
    amount = run.steps * run.batch * run.units
    return [
        ("steps", f"{run.stacked_steps:,} stacked + {plan.equilibrium_steps:,} at equilibrium"),
        (f"{run.unit}s", f"{amount:,} ({_epochs(plan):.3g} times the training data)"),
        ("arithmetic", _flops(plan.total_flops)),
    ]


def _epochs(plan: Plan) -> float:
    run = plan.run
    return run.steps * run.batch * run.units / run.size[1]


def _time(plan: Plan) -> str:
    step, run = plan.step, plan.run
    if step is None:
        return f"time: nothing was measured in {plan.number_format} from which to estimate it"
    stacked, equilibrium = plan.hours
    rows = []
    if run.stacked_steps:
        seconds = step.stacked + plan.transfer
        rows.append(("stacked", f"{1e3 * seconds:.0f} ms a step", f"{_hours(stacked)} h"))
    if plan.equilibrium_steps:
        seconds = step.equilibrium + plan.transfer
        rows.append(("equilibrium", f"{1e3 * seconds:.0f} ms a step", f"{_hours(equilibrium)} h"))
        rows += [(f"  {name}", f"{1e3 * part:.0f} ms") for name, part in step.parts.items()]
    if plan.transfer:
        rows.append(("  sum of gradients (link's rate)", f"{1e3 * plan.transfer:.1f} ms"))
    total = stacked + equilibrium
    rows.append(("the run", "", f"{_hours(total)} h, {_hours(plan.gpus * total)} GPU hours"))
    kind = "measured steps" if step.measured else "ESTIMATE"
    text = _table(f"time ({kind}: {step.basis})", rows)
    if step.too_low:
        text += (
            "\n  Likely several times too low: an evaluation is much smaller than the measured one."
            "\n  A GPU then waits for its kernels to start. Measure some hundred steps."
        )
    return text


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    return f"{title}\n{columns(rows, indent=2)}"


def columns(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Lines of aligned cells; a row may end early."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def _flops(value: float) -> str:
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.4g} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"


def _hours(hours: float) -> str:
    if 0 < hours < 0.01:
        return "below 0.01"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
