"""Estimate the cost of the published runs on 4, 32 and 256 GPUs, without a GPU.

    python scripts/benchmarks/scaling_estimate.py                            # counts, assumptions
    python scripts/benchmarks/scaling_estimate.py --train train.json --scaling scaling.json
    python scripts/benchmarks/scaling_estimate.py --train train.json --scaling scaling.json \\
        --page docs/scaling.md                              # rewrite the tables of that page

Counted: parameters, FLOPs, operations and collectives of a step at its published size
(helpers/work.py). Measured, on a CPU: the share of the attainable rate that a step reaches and its
number of evaluations of f (--train: the --json of bench_train.py), and the evaluations of the
slowest of several processes (--scaling: the --json of bench_scaling.py). Assumed: everything about
the GPUs. helpers/cluster.py combines these figures.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from helpers.arguments import Parser, write_json
from helpers.cluster import (
    Hardware,
    Measured,
    efficiency,
    filled_of,
    run_hours,
    spread_of,
    step_on,
    useful,
    utilisation_of,
)
from helpers.measure import fill, table
from helpers.settings import LANGUAGE, chosen_settings
from helpers.work import Work, count

from lib.errors import InputError, naming
from lib.runs.command_line import exit_code

SIZES = (4, 32, 256)
ASSUMED_UTILISATION = 0.5  # used without --train


def build_parser() -> Parser:
    parser = Parser(prog="scaling_estimate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--settings", default="all", help="names; or language, images, all")
    add("--train", type=Path, help="figures of bench_train.py")
    add("--scaling", type=Path, help="figures of bench_scaling.py")
    add("--page", type=Path, help="write the tables into this file, between its two markers")
    add("--tiny", action="store_true", help="sizes for tests")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the estimate; return the exit code."""
    return exit_code("scaling_estimate.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> str:
    """Print the estimate that the command line describes; return its text."""
    args = build_parser().parse_args(argv)
    names = chosen_settings(args.settings)
    train, scaling = _records(args.train, "setting"), _records(args.scaling, "trainer")
    if args.page is not None:  # before the work
        _fill(args.page, "")
    works = {name: count(name, "tiny" if args.tiny else "full") for name in names}
    measured = {name: _measured(work, train, scaling) for name, work in works.items()}
    text = "\n\n".join(
        [
            _assumptions(Hardware(), args, train, scaling),
            _counts(works.values()),
            _inputs(measured),
            *(_strong(works.values(), measured, kind) for kind in Hardware().peak),
            _weak(works.values(), measured),
            _limits(works.values(), measured),
        ]
    )
    print(text, flush=True)
    if args.page is not None:
        args.page.write_text(_fill(args.page, text), encoding="utf-8")
    write_json(args.json, _figures(works, measured))
    return text


def _assumptions(gpu: Hardware, args: argparse.Namespace, train: dict, scaling: dict) -> str:
    rates = ", ".join(f"{kind} {rate / 1e12:.0f} TFLOP/s" for kind, rate in gpu.peak.items())
    utilisation = "measured" if train else f"{ASSUMED_UTILISATION} (no --train was given)"
    solves = "measured" if train else "every solve runs to its threshold (no --train was given)"
    slowest = "measured" if scaling else "as many as all (no --scaling was given)"
    rows = [
        ["GPU", gpu.name, "assumed"],
        ["peak of dense products", rates, "data sheet"],
        ["memory", f"{gpu.memory / 1e12:.2f} TB/s", "data sheet"],
        [f"link of the {gpu.per_machine} GPUs of a machine", f"{gpu.near / 1e9:.0f} GB/s "
         "in a direction", "data sheet (NVLink)"],
        ["link between machines", f"{gpu.far / 1e9:.0f} GB/s", "one port of 200 Gb/s"],
        ["start of a kernel", f"{1e6 * gpu.launch:.0f} µs", "assumed"],
        ["wait for a residual, once per evaluation", f"{1e6 * gpu.wait:.0f} µs", "assumed"],
        ["hop of a collective, log2 N of them", f"{1e6 * gpu.latency:.0f} µs", "assumed"],
        ["share of the floor's rate", utilisation, "stand-in, from a CPU"],
        ["evaluations of a solve", solves, "stand-in, smaller models on a CPU"],
        ["evaluations of the slowest process", slowest, "stand-in, small models on a CPU"],
    ]  # fmt: skip
    return "### Assumptions\n\n" + table(["what", "value", "from"], rows)


def _counts(works) -> str:
    head = ["setting", "GPUs, batch", "steps", "stacked", "parameters", "MiB summed per step",
            "collectives", "evaluations f / b", "GFLOP per sample f / b / rest / Jacobian loss",
            "operations f / b", "TFLOP per step", "EFLOP of the run"]  # fmt: skip
    rows = []
    for w in works:
        parts = (w.forward, w.backward, w.rest, w.jacobian)
        later = w.steps - w.stacked_steps
        whole = w.batch * (later * w.flops() + w.stacked_steps * w.stacked.flops)
        rows.append(
            [
                w.name,
                f"{w.gpus}, {w.batch}",
                f"{w.steps:,}",
                f"{w.stacked_steps:,}",
                f"{w.parameters:,}",
                f"{w.gradient_bytes / 2**20:.1f}",
                str(w.collectives),
                f"{w.f_evals:g} / {w.b_evals:g}",
                " / ".join(f"{part.flops / 1e9:.3g}" for part in parts),
                f"{w.forward.kernels + w.solver_kernels[0]:.0f} / "
                f"{w.backward.kernels + w.solver_kernels[1]:.0f}",
                f"{w.flops(w.batch) / 1e12:.3g}",
                f"{whole / 1e18:.3g}",
            ]
        )
    never = [w.name for w in works if w.steps <= w.stacked_steps]
    note = f"\n\nWithout a step at equilibrium, as published: {', '.join(never)}." if never else ""
    return "### Counted\n\n" + table(head, rows) + note


def _inputs(measured: dict[str, Measured]) -> str:
    counts = (2, *SIZES)
    head = ["setting", "share of the floor's rate", "share of the threshold f / b",
            *(f"slowest of {n}" for n in counts)]  # fmt: skip
    rows = [
        [name, f"{m.utilisation:.2f}", f"{m.filled[0]:.2f} / {m.filled[1]:.2f}",
         *(f"{m.slowest(0, n):.2f} / {m.slowest(1, n):.2f}" for n in counts)]
        for name, m in measured.items()
    ]  # fmt: skip
    return (
        "### Measured on a CPU, as stand-ins\n\nThe slowest of N processes: its evaluations over "
        "the mean of all, forward / backward, if processes were independent. A threshold cuts "
        f"them.\n\n{table(head, rows)}"
    )


def _strong(works, measured: dict, kind: str) -> str:
    gpu, rows = Hardware(), []
    for w in works:
        m, row = measured[w.name], []
        for n in SIZES:
            if n > w.batch:
                row.append(f"ends at {w.batch}")
                continue
            share = math.ceil(w.batch / n)
            step = step_on(w, n, share, kind, gpu, m, False)
            hours = run_hours(w, n, kind, gpu, m)
            row.append(f"{w.batch / n:.3g}: {1e3 * step.seconds:.0f} ms, {_hours(hours)} h")
        rows.append([w.name, str(w.batch), *row, str(useful(w, kind, gpu, m))])
    head = ["setting", "batch", *(f"{n} GPUs" for n in SIZES), "GPUs at half efficiency"]
    return (
        f"### The published batch, shared ({kind})\n\nSamples per GPU: milliseconds of an "
        f"equilibrium step, GPU hours of the whole run.\n\n{table(head, rows)}"
    )


def _weak(works, measured: dict) -> str:
    gpu, rows = Hardware(), []
    for w in works:
        share, row = w.batch // w.gpus, []
        base = step_on(w, 1, share, "bf16", gpu, measured[w.name], False).seconds
        for n in SIZES:
            step = step_on(w, n, share, "bf16", gpu, measured[w.name], False)
            row.append(f"{n * share}: {1e3 * step.seconds:.0f} ms, {base / step.seconds:.2f}")
        rows.append([w.name, str(share), *row])
    head = ["setting", "per GPU", *(f"{n} GPUs" for n in SIZES)]
    return (
        "### Larger batches, the published share on each GPU (bf16)\n\nBatch: milliseconds of an "
        f"equilibrium step, efficiency.\n\n{table(head, rows)}"
    )


def _limits(works, measured: dict) -> str:
    gpu, rows = Hardware(), []
    for w in works:
        n = min(w.batch, max(SIZES))
        step = step_on(w, n, math.ceil(w.batch / n), "bf16", gpu, measured[w.name], False)
        parts = [f"{100 * part / step.seconds:.0f}" for part in vars(step).values()]
        reached = efficiency(w, n, "bf16", gpu, measured[w.name])
        rows.append([w.name, str(n), *parts, f"{reached:.2f}", step.limit])
    head = ["setting", "GPUs", "computing %", "launches and waits %", "gradients %",
            "latency %", "efficiency", "most"]  # fmt: skip
    return "### Where sharing the published batch ends (bf16)\n\n" + table(head, rows)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _figures(works: dict[str, Work], measured: dict[str, Measured]) -> list[dict]:
    gpu = Hardware()
    return [
        {
            "setting": name,
            "batch": w.batch,
            "parameters": w.parameters,
            "gradient_bytes": w.gradient_bytes,
            "flops_per_step": w.flops(w.batch),
            "utilisation": measured[name].utilisation,
            "gpu_hours": {
                kind: {n: run_hours(w, n, kind, gpu, measured[name]) for n in SIZES if n <= w.batch}
                for kind in gpu.peak
            },
        }
        for name, w in works.items()
    ]


def _measured(work: Work, train: dict, scaling: dict) -> Measured:
    """The measured figures of the setting, or stand-ins from similar settings."""
    name, words = work.name, work.name in LANGUAGE
    found = {key: utilisation_of(record) for key, record in train.items()}
    alike = [u for key, u in found.items() if (key in LANGUAGE) == words]
    other = statistics.median(alike or found.values()) if found else ASSUMED_UTILISATION
    filled = filled_of(train[name], work) if name in train else (1.0, 1.0)
    trainer = "words" if words else "scenes" if "cityscapes" in name else "digits"
    record = scaling.get(name) or scaling.get(trainer)
    return Measured(found.get(name, other), filled, spread_of(record) if record else ((), ()))


def _records(path: Path | None, key: str) -> dict[str, dict]:
    if path is None:
        return {}
    try:
        return {record[key]: record for record in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the --json of the right benchmark: {error}") from error


def _fill(path: Path, tables: str) -> str:
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    with naming(f"--page {path}"):
        return fill(page, "scaling_estimate.py", tables)


if __name__ == "__main__":
    sys.exit(main())
