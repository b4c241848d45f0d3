"""Time training steps in one process and in several, on one machine.

    torchrun --standalone --nproc_per_node=2 scripts/benchmarks/bench_scaling.py  # the quickstart's
    torchrun --standalone --nproc_per_node=2 scripts/benchmarks/bench_scaling.py \\
        --trainers wt103_deq_transformer,imagenet/cls_mdeq_SMALL --json out.json

These arrangements take turns within one group of N processes, on the CPU:

    one      one process, one thread
    threads  one process, N threads
    apart    N processes without communication, one thread each: the cost of sharing the machine
    strong   N processes share the batch of "one"
    weak     N processes, each with the batch of "one"

Times are medians over steps. Efficiency is t(one) / (N t) for strong and threads, t(one) / t for
weak and apart. "waiting" is the share of time in collectives: the time until the slowest process
arrives, and the time that the message travels. "travel" is the time that the last process to
arrive waits.

Solvers stop by the samples of their own process, so processes differ in their evaluations of f
(nfe). "slowest" is the largest nfe of a process divided by the mean over processes, averaged over
steps, forward / backward; 1.00 is no loss. Bytes are what one process hands to collectives in one
step.

The trainers of the quickstart first train --lead steps of each phase, so that the solvers work as
much as in a run. Published settings are scaled as in bench_train.py.
"""

import statistics
import sys
import warnings

import torch
from helpers.arguments import Parser, chosen, write_json
from helpers.measure import describe_machine, table
from helpers.scaling import ARRANGEMENTS, Measured, Plan, measure
from helpers.settings import SIZES, Options
from helpers.traffic import KINDS
from helpers.trainers import EMBEDDED, chosen_trainers

from lib.deq import DEQWarning
from lib.errors import InputError
from lib.runs.command_line import exit_code
from lib.runs.processes import Processes

HEAD = [
    "arrangement", "processes x threads", "batch", "ms/step", "quartiles", "efficiency",
    "waiting %", "travel %", "gradients MiB", "batch norm KiB", "control B", "collectives",
    "nfe f / b", "slowest f / b",
]  # fmt: skip


def build_parser() -> Parser:
    least = {"steps": 1, "turn": 1, "warmup": 1, "lead": 0, "batch": 1, "seed": 0}
    parser = Parser(prog="bench_scaling.py", description=__doc__.split("\n\n")[0], least=least)
    add = parser.add_argument
    add("--trainers", default="quickstart", help=f"of {', '.join(EMBEDDED)}; published settings")
    add("--arrangements", default=",".join(ARRANGEMENTS), help="arrangements beside 'one'")
    add("--steps", type=int, default=40, help="counted steps per arrangement and phase")
    add("--turn", type=int, default=4, help="counted steps per turn; one more begins a turn")
    add("--warmup", type=int, default=2, help="steps of each arrangement before a phase")
    add("--lead", type=int, default=200, help="training steps before a phase (quickstart's)")
    add("--batch", type=int, help="samples per step of one process; default: the trainer's")
    add("--tiny", action="store_true", help="sizes for tests")
    add("--seed", type=int, default=1, help="seed of weights and data")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_scaling.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; return the figures, one record per trainer."""
    args = build_parser().parse_args(argv)
    if args.device.type != "cpu":
        raise InputError("--device cuda: this benchmark is for the CPU")
    names = chosen_trainers(args.trainers)
    kinds = {"one", *chosen("--arrangements", args.arrangements, ARRANGEMENTS)}
    kinds = {name: kind for name, kind in ARRANGEMENTS.items() if name in kinds}
    plan = Plan(args.lead, args.warmup, args.steps, args.turn)
    size = SIZES["tiny" if args.tiny else "small"]
    options = Options(size=size, device=torch.device("cpu"), seed=args.seed)
    records = []
    with Processes.joined() as processes:
        if processes.world_size < 2:
            raise InputError("one process cannot be compared with several: start it with torchrun")
        torch.set_num_threads(1)
        if processes.leads:
            print(describe_machine(options.device).replace("1 threads", "1 thread"), flush=True)
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DEQWarning)
                found = measure(name, processes, options, plan, batch=args.batch, kinds=kinds)
            torch.set_num_threads(1)
            records.append(_record(name, found, processes.world_size, plan))
            if not processes.leads:
                continue
            print(report(records[-1]), flush=True)
            write_json(args.json, records)
    return records


def summarise(found: list[Measured]) -> dict:
    """Summarise one arrangement from the measurements of all processes."""
    seconds = [max(step) for step in zip(*(one.seconds for one in found), strict=True)]
    total, n = sum(seconds), len(found)
    waits = list(zip(*(one.waits for one in found), strict=True))  # step -> process -> collective
    nfe = list(zip(*(one.nfe for one in found), strict=True))
    first = found[0]
    return {
        "batch": first.batch,
        "seconds": statistics.median(seconds),
        "quartiles": statistics.quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2,
        "waiting": sum(sum(map(sum, step)) for step in waits) / n / total,
        "travel": sum(sum(map(min, zip(*step, strict=True))) for step in waits) / total,
        "bytes": {k: statistics.mean(s.get(k, 0) for s in first.bytes) for k in KINDS},
        "calls": {k: statistics.mean(s.get(k, 0) for s in first.calls) for k in KINDS},
        "nfe": [statistics.mean(p[which] for step in nfe for p in step) for which in (0, 1)],
        "slowest": [_slowest([[p[which] for p in step] for step in nfe]) for which in (0, 1)],
        "each": [{"seconds": one.seconds, "nfe": one.nfe} for one in found],  # by process
    }


def report(record: dict) -> str:
    """Format a record as a markdown section with one table per phase."""
    n, text = record["processes"], f"\n## {record['trainer']}\n"
    for phase, found in record["phases"].items():
        base, rows = found["one"]["seconds"], []
        for name, own in found.items():
            kind, ms = ARRANGEMENTS[name], own["seconds"]
            shared = n if kind.wide or (kind.together and not kind.weak) else 1
            size, calls = own["bytes"], sum(own["calls"].values())
            low, high = own["quartiles"]
            rows.append(
                [
                    name,
                    kind.describe(n),
                    str(own["batch"]),
                    f"{1e3 * ms:.1f}",
                    f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                    f"{base / (shared * ms):.2f}",
                    *([""] * 6 if not kind.together else [
                        f"{100 * own['waiting']:.1f}",
                        f"{100 * own['travel']:.1f}",
                        f"{size['gradients'] / 2**20:.3f}",
                        f"{size['batch norm'] / 2**10:.2f}",
                        f"{size['control']:.0f}",
                        f"{calls:.1f}",
                    ]),
                    "{:.1f} / {:.1f}".format(*own["nfe"]),
                    "{:.3f} / {:.3f}".format(*own["slowest"]) if kind.together else "",
                ]
            )  # fmt: skip
        steps = f"{record['steps']} steps of each in turns of {record['turn']}"
        if phase != "stacked":
            steps += "; thresholds allow nfe of {:g} / {:g}".format(*record["most"])
        text += f"\n{phase}, {steps}\n\n{table(HEAD, rows)}\n"
    return text.rstrip("\n")


def _record(name: str, found: dict, n: int, plan: Plan) -> dict:
    return {
        "trainer": name,
        "processes": n,
        "steps": plan.rounds * plan.turn,
        "turn": plan.turn,
        "most": found["equilibrium"]["one"][0].most,
        "phases": {
            phase: {kind: summarise(each) for kind, each in kinds.items()}
            for phase, kinds in found.items()
        },
    }


def _slowest(nfe: list[list[int]]) -> float:
    """Largest nfe of a process / mean over processes, averaged over steps; 1 without solves."""
    ratios = [max(step) / statistics.mean(step) for step in nfe if any(step)]
    return statistics.mean(ratios) if ratios else 1.0


if __name__ == "__main__":
    sys.exit(main())
