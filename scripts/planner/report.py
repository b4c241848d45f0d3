"""The text and the JSON of a plan."""

import math
from collections.abc import Sequence
from itertools import zip_longest

from planner.counting import EQUILIBRIUM
from planner.plan import Plan
from planner.runs import most_evaluations

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
    sections.append(_table("a step", _work(plan)))
    memory = _table(f"memory of a GPU (float32, {plan.together} at once)", _memory(plan))
    memory += (
        "\n  A peak is not the sum of its parts: they are not all there at the same time,"
        "\n  and tensors that an operation needs for a moment are in the peak only."
    )
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
            "peaks": step.peaks,
            "transfer": plan.transfer,
            "hours": {"stacked": stacked, "equilibrium": equilibrium},
        }
    return found


def _work(plan: Plan) -> list[tuple[str, ...]]:
    """FLOPs of a step, by part."""
    run = plan.run
    forward, backward = run.solvers
    parts = {k: v for k, v in plan.step_parts.items() if v or k != "Jacobian loss"}
    *each, total = _flops_adding(list(parts.values()))
    flops = dict(zip(parts, each, strict=True))
    rows = [
        (
            f"forward solve ({forward})",
            f"{plan.f_evals:.4g} evaluations",
            flops["forward solve"],
            _drawn(plan),
        ),
        (
            f"backward solve ({backward})" if plan.b_evals else f"gradient {run.grad}",
            f"{plan.b_evals:.4g} products" if plan.b_evals else "no solve",
            flops["backward solve"],
        ),
        ("rest", "", flops["rest"], "with one evaluation more: that with the gradient"),
    ]
    if "Jacobian loss" in flops:
        share = f"in {_percent(run.jac_share)} of steps"
        rows.append(("Jacobian loss", share, flops["Jacobian loss"], "mean over all steps"))
    rows.append(("a step at equilibrium", "", total))
    if run.border:
        layers = run.settings.n_layer if run.words else run.settings.MODEL.NUM_LAYERS
        rows.append(("a stacked step", f"{layers} evaluations", _flops(plan.flops.stacked)))
    return rows


def _drawn(plan: Plan) -> str:
    """Why the number of evaluations is a mean, if it is."""
    run = plan.run
    low, high = (most_evaluations(run.solvers[0], k) for k in run.drawn_thresholds)
    if low == high:
        return ""
    when = "each step" if run.words else "each step with the Jacobian loss"
    return f"mean: {when} draws {low:.4g} to {high:.4g}"


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
    *hours, total = _adding(list(plan.hours), _digits(sum(plan.hours), 4))
    link = {"sum of gradients": plan.transfer} if plan.transfer else {}
    rows: list[tuple[str, ...]] = []
    if run.stacked_steps:
        rows += _parts("stacked", {"on each GPU": step.stacked, **link}, hours[0])
    if plan.equilibrium_steps:
        rows += _parts("equilibrium", {**step.parts, **link}, hours[1], _origins(plan))
    gpu_hours = plan.gpus * sum(plan.hours)
    rows.append(("the run", "", f"{total} h, {gpu_hours:,.{_digits(gpu_hours, 3)}f} GPU hours"))
    kind = "measured steps" if step.measured else "ESTIMATE"
    text = _table(f"time ({kind}: {step.basis})", rows)
    if plan.transfer:
        text += "\n  The sum of gradients is an estimate from the rate of the link."
    if step.measured:
        one = step.phases[EQUILIBRIUM]
        where = "on one GPU, without the Jacobian loss" if run.jac_share else "on one GPU"
        text += (
            f"\n  The measured step at equilibrium takes {_ms(one['seconds'])} ms {where}:"
            f"\n  {one['f_evaluations']} evaluations and {one['b_evaluations']} products"
            " (table in docs/planning.md)."
        )
    if step.too_low:
        text += (
            "\n  Likely several times too low: an evaluation is much smaller than the measured one."
            "\n  A GPU then waits for its kernels to start. Measure some hundred steps."
        )
    return text


def _parts(
    phase: str, seconds: dict[str, float], hours: str, origins: dict[str, str] | None = None
) -> list[tuple[str, ...]]:
    """Rows of the step of a phase and, if there are several, of its parts."""
    *each, total = _adding([1e3 * s for s in seconds.values()], 1)
    rows: list[tuple[str, ...]] = [(phase, f"{total} ms a step", f"{hours} h")]
    if len(each) > 1:
        for name, ms in zip(seconds, each, strict=True):
            rows.append((f"  {name}", f"{ms} ms", (origins or {}).get(name, "")))
    return rows


def _origins(plan: Plan) -> dict[str, str]:
    """Of the parts of a step at equilibrium: what a reader needs to find the measured ones."""
    step, run = plan.step, plan.run
    found = {"rest": "with the evaluation that has the gradient"}
    if run.jac_share:
        found["Jacobian loss"] = f"{_percent(run.jac_share)} of {_ms(step.jacobian)} ms"
    if step.measured:
        one = step.phases[EQUILIBRIUM]
        for name, ours, which in (
            ("forward solve", plan.f_evals, "f"),
            ("backward solve", plan.b_evals, "b"),
        ):
            count = one[f"{which}_evaluations"]
            if ours != count:
                ms = _ms(one[name.replace(" ", "_")])
                kind = "evaluations" if which == "f" else "products"
                found[name] = f"{ours:.4g}/{count} of {ms} ms: {count} {kind} were measured"
    return found


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    return f"{title}\n{columns(rows, indent=2)}"


def columns(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Lines of aligned cells; a row may end early."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def _adding(parts: Sequence[float], digits: int) -> list[str]:
    """The parts, rounded to so many decimals, and the sum of the rounded parts."""
    whole = [round(part * 10**digits) for part in parts]
    return [f"{n / 10**digits:,.{digits}f}" for n in [*whole, sum(whole)]]


def _digits(value: float, significant: int) -> int:
    """Decimals with which a value has so many significant digits."""
    return max(significant - 1 - math.floor(math.log10(value)), 0) if value > 0 else 0


def _unit(value: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if value >= unit[0]), (1.0, ""))


def _flops_adding(parts: Sequence[float]) -> list[str]:
    """The parts and their sum, in the unit of the sum."""
    size, prefix = _unit(sum(parts))
    digits = _digits(sum(parts) / size, 4)
    return [f"{n} {prefix}FLOP" for n in _adding([part / size for part in parts], digits)]


def _flops(value: float) -> str:
    size, prefix = _unit(value)
    return f"{value / size:.4g} {prefix}FLOP"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"
