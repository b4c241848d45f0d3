"""Train the quickstart's three models with several seeds; print means and standard deviations.

    python scripts/benchmarks/quickstart_seeds.py --json docs/data/quickstart_seeds.json

For comparison, ``digits-stacked`` and ``scenes-stacked`` train the same f as a stack in every
step. The runs lie below --out. A second call continues runs that were cut off, and repeats none.
"""

import argparse
import contextlib
import os
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev

from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_new_process, table

import deq_sequence.quickstart as words
import mdeq_vision.quickstart as images
from deq_sequence.command import run_command
from deq_sequence.evaluation import perplexity
from deq_sequence.options import folder_of, parse
from lib.runs.command_line import exit_code
from lib.runs.processes import Processes
from lib.runs.run_folder import read_metrics
from mdeq_vision.command import load_config, run_folder

ROOT = Path(__file__).resolve().parents[2]
STACKED = "-stacked"
MODELS = {  # and their figures
    "words": "perplexity",
    "digits": "top1",
    "digits" + STACKED: "top1",
    "scenes": "mIoU",
    "scenes" + STACKED: "mIoU",
}
ALWAYS = 10**6  # steps of the stacked phase: more than there are
EXTRA = {name: [] for name in MODELS}  # more flags or overrides of each model, for the tests


def main(argv: list[str] | None = None) -> int:
    return exit_code("quickstart_seeds.py", lambda: run(read(argv)))


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="quickstart_seeds.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), help="what to train")
    add("--seeds", nargs="+", type=int, default=[1111, 1112, 1113], help="seeds of the runs")
    add("--out", type=Path, default=Path("seeds"), help="folder of the runs")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    found = {"machine": describe_machine(options.device), "runs": []}
    print(found["machine"], flush=True)
    for model in dict.fromkeys(options.only):
        for seed in dict.fromkeys(options.seeds):
            if figures_of(model, seed, options.out) is None:
                in_new_process(train, model, seed, options.out)
            figures = figures_of(model, seed, options.out)
            found["runs"].append({"model": model, "seed": seed, **figures})
            print(model, seed, *(f"{k} {v:.4g}" for k, v in figures.items()), sep=" | ", flush=True)
    write_json(options.json, found)
    print(f"\n{report(found['runs'])}")


# ---- one run -----------------------------------------------------------------------------------


def words_arguments(seed: int, out: Path) -> Namespace:
    """The command line of a language model."""
    own = ["--seed", str(seed), "--name", f"seed-{seed}", "--work_dir", str(out / "words")]
    data = ["--data", str(ROOT / "DEQ-Sequence/data/demo"), "--auto_restart"]
    return parse([*words.SETTINGS.split(), *data, *own, *EXTRA["words"]])


def image_configuration(model: str, seed: int, out: Path):
    """The settings of an image model, its yaml file, and what trains it."""
    file, train, _ = images.TASKS[model.removesuffix(STACKED)]
    path = ROOT / "MDEQ-Vision/experiments" / file
    place = out / ("stacked" if model.endswith(STACKED) else "") / f"seed-{seed}"
    opts = ["SEED", str(seed), "OUTPUT_DIR", str(place), "TRAIN.RESUME", "True", *EXTRA[model]]
    if model.endswith(STACKED):
        opts += ["TRAIN.PRETRAIN_STEPS", str(ALWAYS)]
    return load_config(Namespace(cfg=path, opts=opts)), path, train


def train(model: str, seed: int, out: Path) -> None:
    """Train one model; its log is in its folder."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if model == "words":
            run_command(words_arguments(seed, out))
        else:
            cfg, path, begin = image_configuration(model, seed, out)
            begin(cfg, path, Processes())


def figures_of(model: str, seed: int, out: Path) -> dict[str, float] | None:
    """Figures of a finished run by name; None if it is not finished."""
    if model == "words":
        folder = folder_of(words_arguments(seed, out))
    else:
        cfg, path, _ = image_configuration(model, seed, out)
        folder = run_folder(cfg, path)
    records = read_metrics(folder)
    if not records or records[-1]["kind"] != "summary" or not records[-1]["finished"]:
        return None
    name = MODELS[model]
    stacked = [r for r in records if r["kind"] == "valid" and r["phase"] == "stacked"]
    figures = {}
    if stacked and not model.endswith(STACKED):
        figures["stacked, valid"] = stacked[-1][name]
    if model == "words":
        for split in ("valid", "test"):
            (record,) = (r for r in records if r["kind"] == f"final_{split}")
            figures[f"best, {split}"] = perplexity(record["loss"])
        return figures
    valid = {r["step"]: r for r in records if r["kind"] == "valid"}
    for tested in (r for r in records if r["kind"] == "final_test"):
        which = tested["weights"]
        figures[f"{which}, valid"] = valid[tested["of_step"]][name]
        figures[f"{which}, test"] = tested[name]
    return figures


# ---- the table ---------------------------------------------------------------------------------


def report(runs: list[dict]) -> str:
    """Mean and standard deviation of each figure over the seeds, in markdown."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        own = [run for run in runs if run["model"] == model]
        for name in list(own[0])[2:]:  # after model and seed
            values = [run[name] for run in own]
            spread = f"{stdev(values):.3g}" if len(values) > 1 else ""
            rows.append((model, f"{MODELS[model]} ({name})", f"{mean(values):.4g}", spread))
    head = ("model", "figure (weights, data)", "mean", "standard deviation")
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
