"""Time a training step of the published settings: our fast form and the plain published form.

    python scripts/benchmarks/bench_train.py                                  # all settings
    python scripts/benchmarks/bench_train.py --settings wt103_deq_transformer # or a,b,c
    python scripts/benchmarks/bench_train.py --settings images --forms plain,fast,fast-bf16
    python scripts/benchmarks/bench_train.py --plain torchdeq                 # plain: its solvers

These forms of a step take turns in one process:

    plain              as first published: full-memory solvers, all work inside f, float32
                       (scripts/benchmarks/helpers/plain_*.py)
    fast               ours, float32
    fast-bf16          ours, bfloat16 inside f
    fast-compile       ours, float32, f through torch.compile
    fast-bf16-compile  both
    fast-graph         ours, float32, f in CUDA graphs where there is a GPU
    fast-gmres         ours, float32, GMRES for the adjoint

All forms start from the same weights and use the same random data, masks and vectors. So the
float32 forms have the same losses up to rounding. "loss diff" is the largest relative difference
to the first form over all steps. On a GPU, sizes are the published ones per GPU; on a CPU they
are reduced so that a step takes some seconds (--size). Times are medians. "floor" is a lower bound
for the time of every form: the step's arithmetic at the measured matrix rate, plus the least
traffic of the solvers at the measured bandwidth (scripts/benchmarks/helpers/floor.py).
"""

import argparse
import statistics
import sys
import warnings

import torch
from helpers import floor, steps
from helpers.arguments import Parser, chosen, write_json
from helpers.measure import describe_machine, table
from helpers.plain_solvers import torchdeq_solver
from helpers.settings import FORMS, LANGUAGE, SIZES, Options, Size, chosen_settings
from helpers.tasks import Task, make_task

from lib.deq import DEQWarning
from lib.errors import InputError, check
from lib.runs.command_line import exit_code
from lib.solvers.precision import allow_tf32

MAIN_SETTING, MAIN_STEPS, STEPS = "wt103_deq_transformer", 20, 6
HEAD = [
    "form", "step ms", "ratio", "units/s", "forward", "backward", "optimiser", "nfe f / b",
    "f %", "solvers %", "rest %", "GFLOP", "floor ms", "x floor", "peak MiB", "loss diff",
]  # fmt: skip


def build_parser() -> Parser:
    least = {"steps": 1, "warmup": 0, "batch": 1, "vocab": 40, "threads": 1, "seed": 0}
    parser = Parser(prog="bench_train.py", description=__doc__.split("\n\n")[0], least=least)
    add = parser.add_argument
    add("--settings", default="all", help="names; or language, images, all")
    add("--forms", help=f"of {', '.join(FORMS)} (default: plain,fast; on a GPU also the others)")
    add("--plain", default="published", choices=("published", "torchdeq"), help="its solvers")
    add("--size", choices=tuple(SIZES), help="default: full on a GPU, small on a CPU")
    add("--tiny", action="store_const", const="tiny", dest="size", help="the same as --size tiny")
    add("--steps", type=int, help=f"timed steps ({MAIN_STEPS} for {MAIN_SETTING}, else {STEPS})")
    add("--warmup", type=int, default=3, help="untimed first steps; the memory must be full")
    add("--batch", type=int, help="sequences or images per step")
    add("--vocab", type=int, help="words of the language settings")
    add("--gain", type=float, help="gain of the weights (scripts/benchmarks/helpers/tasks.py)")
    add("--lam", type=float, help="absolute ridge of Anderson, 1e-4 as published; default: ours")
    add("--jac-freq", type=float, help="share of steps with the Jacobian loss; as published")
    add("--threads", type=int, help="CPU threads")
    add("--seed", type=int, default=1, help="seed of weights and data")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_train.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; return the figures, one record per setting."""
    args = build_parser().parse_args(argv)
    names = chosen_settings(args.settings)
    options = _options(args)
    if args.gain is not None and args.gain > 1 and not set(names) <= set(LANGUAGE):
        raise InputError(f"--gain is {args.gain}, but image settings need one of at most 1")
    if args.plain == "torchdeq":
        torchdeq_solver("broyden")  # an early error if torchdeq is not installed
    forms = _forms(args.forms, options.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    allow_tf32(False)
    records = []
    print(describe_machine(options.device), flush=True)
    for name in names:
        count = args.steps or (MAIN_STEPS if name == MAIN_SETTING else STEPS)
        with warnings.catch_warnings():
            # The published thresholds stop many adjoint solves early.
            warnings.simplefilter("ignore", DEQWarning)
            records.append(measure(name, forms, options, count, args.warmup))
        print(report(records[-1]), flush=True)
        write_json(args.json, records)
    return records


def measure(name: str, forms: list[str], options: Options, count: int, warmup: int) -> dict:
    """Measure all figures of one setting."""
    tasks = {form: make_task(name, FORMS[form], options) for form in forms}
    log = steps.interleaved(tasks, count, warmup)
    first = next(iter(tasks.values()))
    extra = warmup + count  # index of further steps, for measurements that would disturb the times
    copy = floor.bandwidth(options.device)
    rates = {
        dtype: floor.matrix_rate(first.gemm, getattr(torch, dtype), options.device)
        for dtype in {_dtype(task) for task in tasks.values()}
    }
    record = {
        "setting": name,
        "unit": first.unit,
        "units_per_step": first.units,
        "steps": count,
        "warmup": warmup,
        "solvers": list(first.methods),
        "plain_solvers": options.plain,
        "gemm": list(first.gemm),
        "matrix_rate": rates,
        "bandwidth": copy,
        "forms": {},
    }
    flops = {
        form: steps.flops(task, extra) for form, task in tasks.items() if not FORMS[form].compile
    }
    for form, task in tasks.items():
        times = log[form]
        inside = steps.shares(task, extra + 1)
        # FLOPs of a compiled form cannot be counted; take the least of the eager forms.
        work = min(flops.values()) if flops else 0
        record["forms"][form] = {
            "step": statistics.median(times.totals),
            "forward": statistics.median(times.forward),
            "backward": statistics.median(times.backward),
            "optimizer": statistics.median(times.optimizer),
            "steps": times.totals,
            "losses": times.losses,
            "f_nfe": statistics.mean(times.f_nfe),
            "b_nfe": statistics.mean(times.b_nfe),
            "shares": inside.parts,
            "solver_bytes": inside.solver_bytes,
            "flops": flops.get(form),
            "floor": work / rates[_dtype(task)] + inside.solver_bytes / copy,
            "peak_bytes": steps.peak_bytes(task, extra + 2),
            "loss_difference": max(
                abs(loss - true) / abs(true)
                for loss, true in zip(times.losses, log[forms[0]].losses, strict=True)
            ),
        }
    record["regularised_steps"] = sum(
        first.is_regularised(index) for index in range(warmup, warmup + count)
    )
    eager = next((t for form, t in tasks.items() if not FORMS[form].compile), first)
    record["spectral_radius"] = steps.spectral_radius(eager, extra + 3).tolist()
    return record


def report(record: dict) -> str:
    """Format a record as a markdown section."""
    forms = record["forms"]
    base = next(iter(forms.values()))["step"]
    rows = []
    for form, found in forms.items():
        own, work = found["step"], found["flops"]
        rows.append(
            [
                form,
                f"{1e3 * own:.0f}",
                f"{base / own:.2f}",
                f"{record['units_per_step'] / own:.1f}",
                *(f"{1e3 * found[part]:.0f}" for part in ("forward", "backward", "optimizer")),
                f"{found['f_nfe']:.1f} / {found['b_nfe']:.1f}",
                *(f"{100 * share:.0f}" for share in found["shares"]),
                "" if work is None else f"{work / 1e9:.1f}",
                f"{1e3 * found['floor']:.0f}",
                f"{own / found['floor']:.2f}",
                f"{found['peak_bytes'] / 2**20:.1f}",
                f"{found['loss_difference']:.1e}",
            ]
        )
    radius = record["spectral_radius"]
    rates = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in record["matrix_rate"].items())
    unit = record["unit"]
    head = [cell.replace("units", unit) for cell in HEAD]
    return (
        f"\n## {record['setting']}\n\n"
        f"{record['units_per_step']} {unit} per step; {' / '.join(record['solvers'])}; spectral "
        f"radius {min(radius):.2f} to {max(radius):.2f}; {record['steps']} steps, "
        f"{record['regularised_steps']} with the Jacobian loss; products of "
        f"{' x '.join(map(str, record['gemm']))}: {rates}; copy "
        f"{record['bandwidth'] / 1e9:.1f} GB/s\n\n" + table(head, rows)
    )


def _dtype(task: Task) -> str:
    return "bfloat16" if task.form.amp == "bf16" else "float32"


def _forms(text: str | None, device: torch.device) -> list[str]:
    if text is None:
        text = "plain,fast" if device.type == "cpu" else "plain,fast,fast-bf16,fast-compile"
    return chosen("--forms", text, FORMS)


def _options(args: argparse.Namespace) -> Options:
    gain, lam, freq = args.gain, args.lam, args.jac_freq
    check(gain is None or gain > 0, "--gain", gain, "above 0")
    check(lam is None or lam >= 0, "--lam", lam, "0 or more")
    check(freq is None or 0 <= freq <= 1, "--jac-freq", freq, "between 0 and 1")
    size: Size = SIZES[args.size or ("full" if args.device.type == "cuda" else "small")]
    return Options(
        size=size,
        device=args.device,
        plain=args.plain,
        seed=args.seed,
        gain=gain,
        lam=lam,
        jac_freq=freq,
        batch=args.batch,
        vocab=args.vocab or size.vocab,
    )


if __name__ == "__main__":
    sys.exit(main())
