"""Time to quality: the quickstart's tasks with the published options and with the best ones.

    python scripts/benchmarks/bench_quality.py --json docs/data/time_to_quality.json

The target of a task and a seed is the validation figure that the published options end with. What
counts is the training time until a validation of the equilibrium first reaches it: without the
start of the program, validations and checkpoints. All validations solve as the published options
do, from zero. Every run has a process of its own with one thread; published and best take turns.
The runs lie below --out. A second call continues runs that were cut off, and repeats none; the
file of --json keeps the runs of other calls.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import in_new_process, table
from helpers.runs import machine_of_one_thread
from helpers.settings import ROOT

import deq_sequence.quickstart as words
import mdeq_vision.quickstart as images
from deq_sequence.command import run_command
from deq_sequence.evaluation import perplexity
from deq_sequence.options import folder_of
from deq_sequence.options import parse as parse_words
from deq_sequence.text_trainer import LMTrainer
from lib.runs.command_line import exit_code
from lib.runs.processes import Processes
from lib.runs.run_folder import read_metrics
from lib.runs.trainer import Trainer
from mdeq_vision.command import load_config, run_folder
from mdeq_vision.image_trainer import ImageTrainer

PUBLISHED, BEST = "published", "best"
_SOLVES = "--grad ift --f_solver anderson --f_thres 12 --b_solver broyden --b_thres 13"
_FEW = "--f_start learned --f_thres 3 --pretrain_steps 500 --max_step 900"
_FEW_IMAGES = (
    "TRAIN.OPTIMIZER muon DEQ.F_START learned DEQ.F_SOLVER anderson DEQ.F_THRES 3 "
    "DEQ.GRAD phantom:steps=3,damping=0.9,form=neumann"
)
# Changes of the settings in deq_sequence/quickstart.py, and of the yaml files.
OPTIONS = {
    "words": {PUBLISHED: f"{_SOLVES} --optim Adam --lr 0.001", BEST: _FEW},
    "words-muon": {PUBLISHED: _SOLVES, BEST: "--f_start learned --f_thres 3"},
    "digits": {
        PUBLISHED: "",
        BEST: f"{_FEW_IMAGES} "
        "MODEL.INIT_WEIGHTS True TRAIN.PRETRAIN_STEPS 0 TRAIN.END_EPOCH 12 "
        "LOSS.JAC_LOSS_FREQ 0.2 LOSS.JAC_LOSS_WEIGHT 1.5",
    },
    "scenes": {
        PUBLISHED: "",
        BEST: f"{_FEW_IMAGES} "
        "MODEL.NUM_LAYERS 2 TRAIN.PRETRAIN_STEPS 250 TRAIN.END_EPOCH 6 "
        "LOSS.USE_OHEM True LOSS.OHEMKEEP 4000 LOSS.JAC_LOSS_FREQ 0.1 "
        "LOSS.JAC_LOSS_WEIGHT 2.0 LOSS.PRETRAIN_JAC_LOSS_WEIGHT 1.0",
    },
}
MUON = "-muon"  # ends the names of tasks in which the published options have Muon, too
OPTIONS[f"scenes{MUON}"] = {
    PUBLISHED: "TRAIN.OPTIMIZER muon",
    BEST: OPTIONS["scenes"][BEST],
}
FIGURES = {"words": "perplexity", "digits": "top1", "scenes": "mIoU"}
LOWER_IS_BETTER = ("perplexity",)
EXTRA: dict[str, list[str]] = {task: [] for task in OPTIONS}  # more settings, for the tests


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_quality.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_quality.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="tasks")
    add("--seeds", nargs="+", type=int, default=[1111, 1112, 1113], help="seeds of the runs")
    add("--out", type=Path, default=Path("quality"), help="folder of the runs")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    found = {"machine": machine_of_one_thread(), "runs": []}
    if options.json is not None and options.json.exists():
        found["runs"] = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    for task in dict.fromkeys(options.only):
        for seed in dict.fromkeys(options.seeds):
            pair: dict[str, dict] = {}
            for name in (PUBLISHED, BEST):
                if not finished(read_metrics(folder_of_run(task, name, seed, options.out))):
                    in_new_process(train, task, name, seed, options.out)
                records = read_metrics(folder_of_run(task, name, seed, options.out))
                target = pair[PUBLISHED]["final"] if pair else None
                pair[name] = figures(task, records, target)
                key = {"task": task, "options": name, "seed": seed}
                others = [r for r in found["runs"] if not key.items() <= r.items()]
                found["runs"] = [*others, {**key, **pair[name]}]
                write_json(options.json, found)
                print(task, name, seed, f"{pair[name]['cpu']:.0f} s", sep=" | ", flush=True)
    print(f"\n{found['machine']}\n\n{report(found)}")


# ---- one run -----------------------------------------------------------------------------------


def kind(task: str) -> str:
    """The quickstart's name of a task."""
    return task.removesuffix(MUON)


def words_arguments(task: str, name: str, seed: int, out: Path) -> Namespace:
    """The command line of a language model."""
    own = ["--seed", str(seed), "--name", f"{name}-{seed}", "--work_dir", str(out / task)]
    data = ["--data", str(ROOT / "DEQ-Sequence/data/demo"), "--num_threads", "1", "--auto_restart"]
    flags = [*words.SETTINGS.split(), *data, "--eval-interval", "100"]
    return parse_words([*flags, *EXTRA[task], *OPTIONS[task][name].split(), *own])


def image_configuration(task: str, name: str, seed: int, out: Path):
    """The settings of an image model, its yaml file, and what trains it."""
    file, begin, _ = images.TASKS[kind(task)]
    path = ROOT / "MDEQ-Vision/experiments" / file
    opts = [
        "SEED",
        str(seed),
        "OUTPUT_DIR",
        str(out / task / f"{name}-{seed}"),
        "TRAIN.RESUME",
        "True",
    ]
    opts += [*EXTRA[task], *OPTIONS[task][name].split()]
    return load_config(Namespace(cfg=path, opts=opts)), path, begin


def folder_of_run(task: str, name: str, seed: int, out: Path) -> Path:
    if kind(task) == "words":
        return folder_of(words_arguments(task, name, seed, out))
    cfg, path, _ = image_configuration(task, name, seed, out)
    return run_folder(cfg, path)


def finished(records: list[dict]) -> bool:
    return bool(records) and records[-1]["kind"] == "summary" and records[-1]["finished"]


def train(task: str, name: str, seed: int, out: Path) -> None:
    """Do one run; its log is in its folder."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), timed():
        if kind(task) == "words":
            args = words_arguments(task, name, seed, out)
            judge = words_arguments(task, PUBLISHED, seed, out)
            with judged_words(judge.f_solver, judge.f_thres):
                run_command(args)
        else:
            cfg, path, begin = image_configuration(task, name, seed, out)
            judge = image_configuration(task, PUBLISHED, seed, out)[0].DEQ
            with judged_images(judge.F_SOLVER, judge.F_THRES):
                begin(cfg, path, Processes())


# ---- the clock, and validations as the published options make them -------------------------------


class Clock:
    """Adds up wall-clock and CPU seconds of ``with`` blocks."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Runs in this block write the seconds of their steps, of data too, with each checkpoint."""
    clock, resumed = Clock(), []
    update, fetch, save = Trainer.update, Processes.next, Trainer.save

    def timed_update(self, batch):
        if not resumed:  # go on from the last run's record
            before = [r for r in read_metrics(self.run.folder) if r["kind"] == "clock"]
            for record in before[-1:]:
                clock.wall, clock.cpu = clock.wall + record["wall"], clock.cpu + record["cpu"]
            resumed.append(True)
        with clock:
            return update(self, batch)

    def timed_fetch(self, batches):
        with clock:
            return fetch(self, batches)

    def noted_save(self):
        self.run.record("clock", self.step, wall=clock.wall, cpu=clock.cpu)
        save(self)

    with (
        patch.multiple(Trainer, update=timed_update, save=noted_save),
        patch.object(Processes, "next", timed_fetch),
    ):
        yield


@contextlib.contextmanager
def judged_images(f_solver: str, f_thres: int) -> Iterator[None]:
    """Evaluations in this block use this solver from zero; with a start, a record has its own."""
    evaluate = ImageTrainer._evaluate

    def judged(self, dataset, cfg, train_step, *more):
        model = self.model
        own = model.f_solver, model.f_thres, model.start
        try:
            model.f_solver, model.f_thres = f_solver, f_thres
            if model.start is not None and not 0 <= train_step < self.pretrain_steps:
                found = evaluate(self, dataset, cfg, train_step)
                self.run.record("with_start", self.step, **found.figures)
            model.start = None
            return evaluate(self, dataset, cfg, train_step, *more)
        finally:
            model.f_solver, model.f_thres, model.start = own

    with patch.object(ImageTrainer, "_evaluate", judged):
        yield


@contextlib.contextmanager
def judged_words(f_solver: str, f_thres: int) -> Iterator[None]:
    """Evaluations of language models in this block use this solver, from zero."""
    evaluate = LMTrainer.evaluate_text

    def judged(self, data, **changes):
        model = self.model
        own = model.f_solver, model.start
        try:
            model.f_solver, model.start = f_solver, None
            return evaluate(self, data, **changes, f_thres=f_thres)
        finally:
            model.f_solver, model.start = own

    with patch.object(LMTrainer, "evaluate_text", judged):
        yield


# ---- the figures of a run ------------------------------------------------------------------------


def figures(task: str, records: list[dict], target: float | None) -> dict:
    """What a finished run did. ``target`` None: the target is its own final figure."""
    name = FIGURES[kind(task)]
    times = {r["step"]: r for r in records if r["kind"] == "clock"}
    valid = [r for r in records if r["kind"] == "valid" and r["phase"] == "equilibrium"]
    last = valid[-1]
    target = last[name] if target is None else target
    sign = -1 if name in LOWER_IS_BETTER else 1
    reached = [r["step"] for r in valid if sign * r[name] >= sign * target]
    whole = times[max(times)]
    solved = [r for r in records if r["kind"] == "train" and r.get("forward_nfe")]
    started = [r for r in records if r["kind"] == "with_start"]
    tested = [r for r in records if r["kind"].startswith("final_test")]
    if kind(task) == "words":
        tested = [r | {name: perplexity(r["loss"])} for r in tested]
    found = {
        "final": last[name],
        "test": next((r[name] for r in tested if name in r), None),
        "nfe": last["nfe"],
        "rel_residual": last["rel_residual"],
        "nfe_with_start": started[-1]["nfe"] if started else None,
        "steps": last["step"],
        "training_nfe": mean(r["forward_nfe"] for r in solved),
        "training_adjoint_nfe": mean(r.get("backward_nfe", 0.0) for r in solved),
        "wall": whole["wall"],
        "cpu": whole["cpu"],
        "target": target,
        "steps_to_target": None,
        "wall_to_target": None,
        "cpu_to_target": None,
    }
    if reached:
        first = times[reached[0]]
        found |= {"steps_to_target": reached[0]}
        found |= {"wall_to_target": first["wall"], "cpu_to_target": first["cpu"]}
    return found


def report(found: dict) -> str:
    """Two tables: the times of each seed, and what the final models are."""
    runs = {(r["task"], r["seed"], r["options"]): r for r in found["runs"]}
    pairs = [
        (task, seed, runs[task, seed, PUBLISHED], runs[task, seed, BEST])
        for task, seed, name in runs
        if name == BEST
    ]
    head = ["task, seed", "target", "CPU s to the target, published", "best", "ratio"]
    head += ["CPU s in all, published", "best", "best to the target / published in all"]
    times = table(head, [_times(*pair) for pair in pairs])
    head = ["task, options", "validation figures", "test figures", "residuals"]
    head += ["evaluations in validation, from zero", "from the start"]
    head += ["in a training step", "in its adjoint"]
    names = dict.fromkeys((r["task"], r["options"]) for r in found["runs"])
    rows = [_models(*pair, [r for k, r in runs.items() if (k[0], k[2]) == pair]) for pair in names]
    return f"{times}\n\n{table(head, rows)}"


def _times(task: str, seed: int, published: dict, best: dict) -> list[str]:
    to_target, first = best["cpu_to_target"], published["cpu_to_target"]

    def share(part: float | None, whole: float) -> str:
        return "" if part is None else f"{part / whole:.2f}"

    return [
        f"{task}, {seed}",
        _shown(task, published["final"]),
        f"{first:.0f}",
        "not reached" if to_target is None else f"{to_target:.0f}",
        share(to_target, first),
        f"{published['cpu']:.0f}",
        f"{best['cpu']:.0f}",
        share(to_target, published["cpu"]),
    ]


def _models(task: str, name: str, rows: list[dict]) -> list[str]:
    def values(key: str, form: str) -> str:
        found = [row[key] for row in rows if row[key] is not None]
        return f"{mean(found):{form}}" if found else ""

    tested = [_shown(task, row["test"]) for row in rows if row["test"] is not None]
    return [
        f"{task}, {name}",
        ", ".join(_shown(task, row["final"]) for row in rows),
        ", ".join(tested),
        ", ".join(f"{row['rel_residual']:.1e}" for row in rows),
        values("nfe", ".1f"),
        values("nfe_with_start", ".1f"),
        values("training_nfe", ".1f"),
        values("training_adjoint_nfe", ".1f"),
    ]


def _shown(task: str, figure: float) -> str:
    return f"{figure:.1f}" if kind(task) == "words" else f"{100 * figure:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
