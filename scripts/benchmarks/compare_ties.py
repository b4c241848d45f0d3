"""Train language models with projections tied in each of the three modes; write a table.

    python scripts/benchmarks/compare_ties.py                              # an hour on one thread
    python scripts/benchmarks/compare_ties.py --only small-gmres --seeds 1 2 --out ties

quickstart: the quickstart's language model with narrow clusters (--div_val 2), which need
    projections.
small, small-gmres: d_model 64 on the same text with about 8,000 word types; 300 stacked steps, then
    900 equilibrium steps. The adjoint is solved by Broyden's method as published, or by GMRES.

Every run has one thread and its folder below --out. A second call continues runs that were cut
off, and repeats none. All modes start from the same weights and read the same batches. The last
table shows how each mode loads weights whose two projections are equal or differ.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_new_process, table

from deq_sequence import DEQTransformerLM
from deq_sequence.command import run_command
from deq_sequence.evaluation import perplexity
from deq_sequence.options import parse as parse_flags
from deq_sequence.options import run_folder
from deq_sequence.quickstart import SETTINGS as QUICKSTART
from deq_sequence.text.demo_corpus import SPLITS, build_demo_corpus, demo_texts
from deq_sequence.ties import TIE_PROJ_MODES
from lib.errors import InputError
from lib.runs.atomic_files import atomic_write
from lib.runs.checkpoint import load_state
from lib.runs.command_line import exit_code
from lib.runs.run_folder import SETTINGS, read_metrics

SMALL = """
    --dataset wt103 --d_model 64 --n_head 4 --d_head 16 --d_inner 256 --wnorm --dropout 0.05
    --n_layer 2 --eval_n_layer 2 --adaptive --cutoffs 500 1500 3000 --div_val 2
    --tgt_len 50 --mem_len 50 --eval_tgt_len 50 --batch_size 8 --f_thres 12 --b_thres 12
    --pretrain_steps 300 --max_step 1200 --lr 0.001 --warmup_step 50 --eval-interval 300
"""
PLANS = {
    "quickstart": QUICKSTART + " --div_val 2",
    "small": SMALL,
    "small-gmres": SMALL + " --b_solver gmres",
}
LAST = 50  # the table shows means over this many last training losses and adjoint residuals
MIN_COUNT = 2  # least count in train of a word in the small setting's text; gives 8,000 types
TABLE_FILE, JSON_FILE = "ties.md", "ties.json"


def main(argv: list[str] | None = None) -> int:
    return exit_code("compare_ties.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = __doc__.splitlines()[0]
    parser = Parser(prog="compare_ties.py", description=description, least={"steps": LAST})
    add = parser.add_argument
    add("--only", nargs="+", choices=PLANS, default=list(PLANS), help="what to train")
    add("--modes", nargs="+", choices=TIE_PROJ_MODES, default=list(TIE_PROJ_MODES), help="modes")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of the runs")
    add("--steps", type=int, help="steps in all, a quarter of them stacked; default: the plan's")
    add("--out", type=Path, default=Path("ties"), help="folder of text, runs and table")
    options = parser.parse_args(argv)
    for name in ("only", "modes", "seeds"):  # list each run once
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    return options


def run(options: argparse.Namespace) -> None:
    machine = describe_machine(torch.device("cpu"))
    print(machine, flush=True)
    data = _texts(options.out)
    jobs = {
        (plan, mode, seed): _flags(plan, mode, seed, data, options)
        for plan in options.only
        for seed in options.seeds
        for mode in options.modes
    }
    for flags in jobs.values():  # before the first hour is spent
        _refuse_other_settings(parse_flags(flags))
    rows = []
    for (plan, mode, seed), flags in jobs.items():
        if _finished(parse_flags(flags)) is None:
            in_new_process(train, flags)
        rows.append({"plan": plan, "mode": mode, "seed": seed, **_finished(parse_flags(flags))})
        print(" | ".join(_row(rows[-1])), flush=True)
    found = {"machine": machine, "runs": rows, "loading": loading()}
    text = report(found)
    (options.out / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    for path in (options.out / JSON_FILE, options.json):
        write_json(path, found)
    print(f"\n{text}\n\n{options.out}: {TABLE_FILE}, {JSON_FILE}")


def _texts(out: Path) -> dict[str, Path]:
    """Return the folder of each plan's text; write texts that are missing."""
    demo, more = out / "demo", out / "more_types"
    build_demo_corpus(demo)
    if not (more / "test.txt").exists():  # the last file written
        more.mkdir(exist_ok=True)
        for split, text in demo_texts(MIN_COUNT).items():
            with atomic_write(more / f"{split}.txt") as file:
                file.write(text.encode())
    assert SPLITS[-1] == "test"
    return {plan: demo if plan == "quickstart" else more for plan in PLANS}


def _flags(plan: str, mode: str, seed: int, data: dict, options: argparse.Namespace) -> list[str]:
    more = f"--tie_proj_mode {mode} --seed {seed} --name {plan}-{mode}-{seed} --log-interval 1"
    if options.steps is not None:
        more += f" --max_step {options.steps} --pretrain_steps {options.steps // 4}"
    places = ["--data", str(data[plan]), "--work_dir", str(options.out / "runs")]
    resume = "--auto_restart --num_threads 1 --save-interval 100"
    return [*PLANS[plan].split(), *more.split(), *resume.split(), *places]


def train(flags: list[str]) -> None:
    """Do one run; its log is in its folder."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run_command(parse_flags(flags))


def _folder(args: argparse.Namespace) -> Path:
    return run_folder(args.work_dir, args.dataset, args.name)


def _refuse_other_settings(args: argparse.Namespace) -> None:
    """Refuse to continue a run that was begun with other settings."""
    path = _folder(args) / SETTINGS
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: delete {path.parent}") from error
    # Skip None (cutoffs that follow from the vocabulary) and paths (the folder may have moved).
    own = {name: value for name, value in vars(args).items() if value is not None}
    names = own.keys() - {"data", "work_dir"}
    names = [name for name in names if before.get(name) != own[name]]
    if names:
        raise InputError(
            f"{path.parent} has other settings ({', '.join(sorted(names))}): choose another --out"
        )


def _finished(args: argparse.Namespace) -> dict | None:
    """The figures of a finished run; None if the run is not finished."""
    records = read_metrics(_folder(args))
    final = {r["kind"]: r for r in records if r["kind"] in ("final_valid", "final_test")}
    if len(final) < 2:
        return None
    steps = {r["step"]: r for r in records if r["kind"] == "train"}  # a repeated step counts once
    last = [steps[step] for step in sorted(steps)[-LAST:]]
    residuals = [r["backward_rel_residual"] for r in last if "backward_rel_residual" in r]
    return {
        "loss": mean(r["loss"] for r in last),
        "valid": perplexity(final["final_valid"]["loss"]),
        "test": perplexity(final["final_test"]["loss"]),
        "adjoint_residual": mean(residuals) if residuals else None,
    }


# ---- loading ---------------------------------------------------------------------------------


def loading() -> list[dict]:
    """Load a state dict in each mode, with equal and with different projections."""
    found = []
    for mode in TIE_PROJ_MODES:
        for differ in (False, True):
            model = _small_model("apart")
            if differ:
                with torch.no_grad():
                    model.crit.out_projs[1].weight.add_(1)
            state, other = model.state_dict(), _small_model(mode)
            try:
                load_state(other, state, "weights.pt")
                both = all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
                outcome = "loads, every value as saved" if both else "loads, some values changed"
            except InputError as error:
                outcome = f"refused: {error}"
            found.append({"mode": mode, "differ": differ, "outcome": outcome})
    return found


def _small_model(mode: str) -> DEQTransformerLM:
    return DEQTransformerLM(
        *(20, 1, 1, 2, 8, 4, 8, 0.0, 0.0),
        **{"cutoffs": [5, 10], "div_val": 2, "tie_projs": [False, True, True]},
        tie_proj_mode=mode,
    )


# ---- tables ----------------------------------------------------------------------------------


_HEAD = ("setting", "tied projections", "seed", f"mean of the last {LAST} training losses",
         "valid perplexity", "test perplexity", "adjoint residual")  # fmt: skip


def report(found: dict) -> str:
    """Format all tables in markdown."""
    parts = [found["machine"], table(_HEAD, [_row(row) for row in found["runs"]]), means(found)]
    lines = [
        [x["mode"], "differ" if x["differ"] else "equal", x["outcome"]] for x in found["loading"]
    ]
    parts.append(table(("tied projections", "the file's two", "loading"), lines))
    return "\n\n".join(parts)


def means(found: dict) -> str:
    """Format the means and standard deviations over the seeds in markdown."""
    groups: dict = {}
    for row in found["runs"]:
        groups.setdefault((row["plan"], row["mode"]), []).append(row)
    lines = [
        [*names, len(rows), *(_spread(rows, f, d) for f, d in _FIGURES.items())]
        for names, rows in groups.items()
    ]
    return table((*_HEAD[:2], "runs", *_HEAD[3:6]), lines)


_FIGURES = {"loss": 3, "valid": 1, "test": 1}  # figure -> shown decimals


def _row(row: dict) -> list[str]:
    residual = row["adjoint_residual"]
    return [
        *(row["plan"], row["mode"], str(row["seed"])),
        *(f"{row[figure]:.{digits}f}" for figure, digits in _FIGURES.items()),
        "" if residual is None else f"{residual:.1e}",
    ]


def _spread(rows: list[dict], figure: str, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    values = [row[figure] for row in rows]
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
