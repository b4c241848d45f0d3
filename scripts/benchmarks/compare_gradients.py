"""Train the quickstart's models with every gradient and solver; write a table and two figures.

    python scripts/benchmarks/compare_gradients.py                    # half an hour on two cores
    python scripts/benchmarks/compare_gradients.py --tasks words --steps 400 --only phantom ift,

Words (the quickstart's language model) and digits (its classifier) are trained once in the stacked
phase. From these weights each variant trains in the equilibrium phase, with and without the
Jacobian loss, with the same constant learning rate and the same batches. Each variant trains for
a fixed number of steps, and continues to a fixed time if the steps took less. Every run has one
thread; two runs go on at a time.

Now and then a run probes a few samples: the variant's gradient against the exact gradient (fixed
point and adjoint solved to 1e-6), the residuals of the solves (the table shows the largest), and
the spectral radius at the fixed point.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from helpers.arguments import Parser, write_json
from helpers.comparison import FIGURE, TASKS, Plan, Variant, make_start, run_variant
from helpers.comparison_figures import COSTS_FILE, CURVES_FILE, draw
from helpers.measure import describe_machine, table

from lib.errors import InputError, check
from lib.runs.command_line import exit_code
from lib.runs.figures import PASSES

# The published gradient with three budgets, then other solvers and gradients with the smaller
# budgets. shine needs Broyden's method; reversible and unroll iterate without a solver.
VARIANTS = [
    Variant("ift", f_thres=12, b_thres=12),
    Variant("ift"),
    Variant("ift", f_thres=30, b_thres=30),
    # An absolute ridge, as published.
    Variant("ift", "broyden", "anderson:lam=1e-4", 5, 5),
    Variant("ift", "broyden", "anderson:lam=1e-4", 10, 10),
    Variant("ift", "broyden", "broyden", 12, 12),
    Variant("ift", "fixed_point_iteration", "fixed_point_iteration", 12, 12),
    Variant("ift", "newton_krylov", "gmres", 30, 12),
    Variant("ift", "anderson", "gmres", 12, 12),
    Variant("ift", "anderson", "bicgstab", 12, 13),
    Variant("shine", "broyden", f_thres=12),
    Variant("shine:refine=3", "broyden", f_thres=12),
    Variant("jfb"),
    Variant("phantom:steps=3,damping=0.8"),
    Variant("phantom:steps=3,damping=0.8,form=neumann"),
    Variant("phantom:steps=5,damping=0.5", f_thres=12),
    Variant("reversible:damping=0.8"),
    Variant("unroll"),
    Variant("unroll:checkpointing=true"),
]
REGULARISED = [
    *VARIANTS[:3],
    Variant("shine", "broyden", f_thres=12),
    Variant("jfb"),
    Variant("phantom:steps=3,damping=0.8"),
    Variant("reversible:damping=0.8"),
    Variant("unroll"),
]
PLANS = {
    "words": Plan("words", 200, 180, 35.0, (0.002, 0.001), 0.3),
    "digits": Plan("digits", 200, 100, 15.0, (0.005, 0.002), 2.0),
}
TABLE_FILE, JSON_FILE = "gradients.md", "gradients.json"


def main(argv: list[str] | None = None) -> int:
    return exit_code("compare_gradients.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="compare_gradients.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train")
    add("--only", nargs="+", help="prefixes of variants' names; default: all variants")
    add("--steps", type=int, help="steps at equilibrium; default: the task's")
    add("--stacked", type=int, help="stacked steps of the common start; default: the task's")
    add("--seconds", type=float, help="time of the same-time columns; default: the task's")
    add("--rate", type=float, help="learning rate at equilibrium; default: the task's")
    add("--out", type=Path, default=Path("comparison"), help="folder of tables, figures and JSON")
    add("--tiny", action="store_true", help="tiny models, for a test of this command")
    options = parser.parse_args(argv)
    for name in ("steps", "stacked", "seconds", "rate"):
        value = getattr(options, name)
        fits = value is None or 0 < value < math.inf  # also refuses NaN
        check(fits, f"--{name}", value, "above 0 and finite")
    options.variants = [
        (variant, regularised)
        for regularised, variants in ((False, VARIANTS), (True, REGULARISED))
        for variant in variants
        if options.only is None or variant.name.startswith(tuple(options.only))
    ]
    if not options.variants:
        raise InputError(
            f"--only {' '.join(options.only)}: no variant begins so; there are "
            + "; ".join(variant.name for variant in VARIANTS)
        )
    return options


def run(options: argparse.Namespace) -> None:
    # Otherwise the memory profiler logs, in each run, about memory allocated before it began.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    machine, begin = describe_machine(torch.device("cpu")), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    print(machine, flush=True)
    found: dict = {"machine": machine}
    for task in options.tasks:
        plan = _plan(task, options)
        with (
            tempfile.TemporaryDirectory() as folder,
            multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool,
        ):
            path = Path(folder) / "start.pt"
            start = pool.apply(make_start, (plan, path))
            jobs = [
                pool.apply_async(run_variant, (plan, variant, regularised, path))
                for variant, regularised in options.variants
            ]
            outcomes = []
            for (variant, _), job in zip(options.variants, jobs, strict=True):
                outcomes.append({"name": variant.name, **job.get()})
                print(f"{task}: {' | '.join(filter(None, _row(task, outcomes[-1])))}", flush=True)
            pool.close()
            pool.join()
        found[task] = {"plan": vars(plan), "start": start, "outcomes": outcomes}
    found["minutes"] = (time.perf_counter() - begin) / 60
    text = report(found)
    (options.out / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    for path in (options.out / JSON_FILE, options.json):
        write_json(path, found)
    draw(found, options.out)
    names = TABLE_FILE, JSON_FILE, COSTS_FILE, CURVES_FILE
    print(f"\n{text}\n\n{options.out}: {', '.join(names)}")


def _plan(task: str, options: argparse.Namespace) -> Plan:
    plan = PLANS[task]
    return replace(
        plan,
        tiny=options.tiny,
        probes=1 if options.tiny else plan.probes,
        steps=options.steps or plan.steps,
        stacked=options.stacked or plan.stacked,
        seconds=options.seconds or plan.seconds,
        rates=(plan.rates[0], options.rate or plan.rates[1]),
    )


# ---- table -----------------------------------------------------------------------------------


def report(found: dict) -> str:
    """Format the tables of all tasks in markdown."""
    parts = [f"{found['machine']}; {found['minutes']:.0f} minutes in all"]
    return "\n\n".join(parts + [task_report(found, task) for task in TASKS if task in found])


def task_report(found: dict, task: str) -> str:
    """Format what the runs of a task share, and their table."""
    plan, start = found[task]["plan"], found[task]["start"]
    what = FIGURE[task]
    shared = (
        f"**{task}**: {plan['stacked']} stacked steps (validation {what} "
        f"{_shown(task, start)}), then {plan['steps']} steps, or {plan['seconds']:.0f} s of "
        f"training on one thread, at equilibrium, at a learning rate of {plan['rates'][1]:g}"
    )
    head = (
        "gradient, forward solver / backward solver", "Jacobian loss",
        f"loss, {what} after the steps", "after the time", "ms per step",
        "evaluations forward", "backward", "MiB", "residual forward", "backward",
        "cosine", "spectral radius",
    )  # fmt: skip
    rows = [_row(task, outcome) for outcome in found[task]["outcomes"]]
    return f"{shared}\n\n{table(head, rows)}"


def _row(task: str, outcome: dict) -> list[str]:
    probes = outcome["probes"]
    last = probes[-1]
    cosines = [p["cosine"] for p in probes]
    return [
        outcome["name"],
        "yes" if outcome["regularised"] else "",
        _figures(task, outcome["at_steps"]),
        f"{_figures(task, outcome['at_seconds'])} ({outcome['at_seconds']['steps']})",
        f"{1000 * outcome['seconds_per_step']:.0f}",
        f"{outcome['forward_nfe']:.1f}",
        f"{outcome['backward_nfe']:.1f}",
        f"{outcome['peak_mib']:.0f}",
        *(_worst(probes, f"{which}_residual") for which in PASSES),
        f"{min(cosines):.3f} to {max(cosines):.3f}",
        f"{probes[0]['spectral_radius']:.2f} to {last['spectral_radius']:.2f}",
    ]


def _worst(probes: list[dict], name: str) -> str:
    found = [p[name] for p in probes if p[name] is not None]
    return f"{max(found):.1g}" if found else ""


def _figures(task: str, figures: dict) -> str:
    return f"{figures['loss']:.3f}, {_shown(task, figures)}"


def _shown(task: str, figures: dict) -> str:
    value = figures[FIGURE[task]]
    return f"{value:.1f}" if task == "words" else f"{100 * value:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
