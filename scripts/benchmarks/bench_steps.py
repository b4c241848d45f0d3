"""Compare training steps with the plain published form, with torchdeq, and bf16 with float32.

    pip install --no-deps torchdeq==0.1.0   # for the rows with torchdeq
    python scripts/benchmarks/bench_steps.py  # all rows; those of "words" take minutes each
    python scripts/benchmarks/bench_steps.py --rows plain-cifar,small-phantom --repeats 15

Rows "plain-..." are training steps in the plain published form (helpers/plain_*.py) and in ours:
language models of width 64 ("small"), 256 ("wide") and the WikiText-103 setting with d_inner 4800
and 4 sequences ("words"); image models on 16 CIFAR images and 2 pictures of 128 x 64 pixels. Beside
torchdeq a step is that of our language model, with our f, data, softmax and optimiser; only what
solves and differentiates is torchdeq's. No solve stops before its threshold there, so that both
evaluate f equally often. (Evaluations are those of the forward solve, and + those of the adjoint
where they are known; torchdeq's count has those of its gradient in it.) In all other rows solves
stop at 1e-3, as usual. "gmres" is our form with GMRES for the adjoint, to the same tolerance and
threshold as the plain form's Broyden. "tiny" is the overhead of a solver alone, as in
bench_solvers.py.

The forms take turns in one process, on one thread. Seconds are medians of CPU time, which other
work on the machine disturbs less than wall time, and a ratio is the median of the rounds' ratios.
"resident" is the most memory that a new process holds in some steps, beyond that before the model
is built; "tensors" is the most that PyTorch holds in a step.
"""

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from bench_solvers import SHAPES, elementwise_map, ours, theirs
from helpers import steps
from helpers.arguments import Parser, chosen, write_json
from helpers.measure import describe_machine, in_new_process, in_turns, resident_bytes, table
from helpers.settings import FORMS, SIZES, Options, Size
from helpers.tasks import Task, make_task
from helpers.torchdeq_layer import TorchdeqLayer

from lib.deq import DEQ, DEQWarning
from lib.runs.command_line import exit_code
from lib.solvers import get_solver

CPU = torch.device("cpu")
WORDS = "wt103_deq_transformer"


def narrow(d_model: int) -> Size:
    """The language model at a smaller width."""
    sizes = {"d_model": d_model, "d_embed": d_model, "d_head": d_model // 4, "d_inner": 4 * d_model}
    text = {"n_head": 4, "div_val": 1, "batch_size": 16, "tgt_len": 32, "mem_len": 32}
    return Size(vocab=2000, language=sizes | text)


MODELS = {  # name -> setting and size
    "small": (WORDS, narrow(64)),
    "wide": (WORDS, narrow(256)),
    "words": (WORDS, SIZES["small"]),
    "cifar": ("cifar/cls_mdeq_TINY", Size(image_batch={"cifar10": 16})),
    "cityscapes": (
        "cityscapes/seg_mdeq_SMALL",
        Size(image_batch={"cityscapes": 2}, image_size={"cityscapes": (128, 64)}),
    ),
}
TINY_STEPS, TINY_SOLVES = 30, 20  # of a solve; of a timed action
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Row:
    """Two forms of one thing: plain, a library, or ours, with a number format or with GMRES.

    The solvers, gradient and thresholds of image models are those of their settings.
    """

    model: str
    solver: str = "anderson"
    adjoint: str = "broyden"
    phantom: int = 0  # steps of the phantom gradient; 0: the adjoint
    neumann: bool = False  # our phantom: a Neumann series at one recorded evaluation of f
    f_thres: int = 30
    b_thres: int = 35
    forms: tuple[str, str] = ("torchdeq", "ours")


PLAIN, GMRES = ("plain", "ours"), ("plain", "gmres")
ROWS = {
    "plain-small": Row("small", f_thres=12, b_thres=13, forms=PLAIN),
    "plain-wide": Row("wide", f_thres=12, b_thres=13, forms=PLAIN),
    "plain-words": Row("words", forms=PLAIN),
    "plain-cifar": Row("cifar", forms=PLAIN),
    "plain-cityscapes": Row("cityscapes", forms=PLAIN),
    "gmres-small": Row("small", f_thres=12, b_thres=13, forms=GMRES),
    "gmres-words": Row("words", forms=GMRES),
    "gmres-cifar": Row("cifar", forms=GMRES),
    "small-phantom": Row("small", phantom=3),
    "small-neumann": Row("small", phantom=3, neumann=True),
    "small-implicit": Row("small"),
    "words-phantom": Row("words", phantom=3),
    "words-neumann": Row("words", phantom=3, neumann=True),
    "words-implicit": Row("words"),
    "tiny-anderson": Row("tiny"),
    "tiny-broyden": Row("tiny", solver="broyden"),
    "small-bf16": Row("small", phantom=3, forms=("float32", "bf16")),
    "words-bf16": Row("words", phantom=3, forms=("float32", "bf16")),
    "words-implicit-bf16": Row("words", forms=("float32", "bf16")),
}


def training_step(row: Row, form: str) -> Task:
    """The training step of a row in one of its forms."""
    setting, size = MODELS[row.model]
    kinds = {"plain": "plain", "bf16": "fast-bf16", "gmres": "fast-gmres"}
    kind = FORMS[kinds.get(form, "fast")]
    task = make_task(setting, kind, Options(size=size, device=CPU))
    if setting == WORDS:
        task.b_thres, task.args.f_thres, task.args.rand_f_thres_delta = row.b_thres, row.f_thres, 0
        task.set_solvers(row.solver, row.adjoint)
    if "plain" in row.forms:
        return task
    if form == "torchdeq":
        gradient = {"grad": row.phantom} if row.phantom else {"ift": True}
        task.model.deq = TorchdeqLayer(
            **gradient, f_solver=row.solver, b_solver=row.adjoint, f_max_iter=row.f_thres,
            b_max_iter=row.b_thres, f_tol=0.0, b_tol=0.0, f_stop_mode="rel", b_stop_mode="rel",
        )  # fmt: skip
        return task
    series = ",form=neumann" if row.neumann else ""
    gradient = f"phantom:steps={row.phantom},damping=1{series}" if row.phantom else "ift"
    eps = 0.0 if "torchdeq" in row.forms else 1e-3
    solvers = (f"{name}:eps={eps}" for name in (row.solver, row.adjoint))
    task.model.deq = DEQ(*map(get_solver, solvers), stop_mode="rel", grad=gradient)
    return task


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def step_seconds(task: Task, index: int) -> tuple[float, float]:
    """CPU seconds of step ``index`` without its data, and its loss."""
    task.begin(index)
    gc.collect()
    losses = []

    def step() -> None:
        loss = task.loss()
        task.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        task.update()
        losses.append(loss.item())

    return cpu_seconds(step), losses[0]


def memory_of(row: Row, form: str) -> dict[str, int]:
    """Bytes that the steps of a form hold at most; call this in a new process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DEQWarning)
    before = resident_bytes("VmRSS")
    task = training_step(row, form)
    for index in range(MEMORY_STEPS):
        step_seconds(task, index)
    resident = resident_bytes("VmHWM") - before
    return {"resident": resident, "tensors": steps.peak_bytes(task, MEMORY_STEPS)}


def measure_steps(row: Row, rounds: int) -> dict[str, dict]:
    """Figures of a row's forms, whose steps take turns."""
    tasks = {form: training_step(row, form) for form in row.forms}
    found = {form: {"seconds": [], "losses": []} for form in row.forms}
    for turn, form in in_turns(tasks, rounds + 1):
        spent, loss = step_seconds(tasks[form], turn)
        found[form]["losses"].append(loss)
        if turn:  # the first round fills the memory of the model
            found[form]["seconds"].append(spent)
    for form, task in tasks.items():
        stats = vars(task.model.deq.stats)
        found[form]["nfe"] = [s.last["nfe"] for s in stats.values() if "nfe" in s.last]
        found[form]["adjoint_residual"] = stats["backward"].last.get("rel_residual")
    del tasks, task
    for form in row.forms:
        found[form] |= in_new_process(memory_of, row, form)
    return found


def measure_solver(row: Row, rounds: int) -> dict[str, dict]:
    """The same of a solver alone, in seconds of CPU time per evaluation, without those of f."""
    shape = SHAPES["tiny"]
    f, x0 = elementwise_map(shape, CPU), torch.zeros(shape)
    nfe = TINY_STEPS + (row.solver == "broyden")

    def repeat(action: Callable[[], object], count: int) -> None:
        for _ in range(count):
            action()

    solves = {"torchdeq": theirs, "ours": ours}
    actions = {
        form: partial(repeat, partial(solves[form], row.solver, f, x0, TINY_STEPS), TINY_SOLVES)
        for form in row.forms
    }
    found = {form: {"seconds": [], "losses": [], "nfe": [nfe]} for form in row.forms}
    with torch.no_grad():
        bare = partial(repeat, partial(f, x0), TINY_SOLVES * nfe)
        for turn, form in in_turns(actions, rounds + 1):
            own = cpu_seconds(actions[form]) - cpu_seconds(bare)
            if turn:
                found[form]["seconds"].append(own / (TINY_SOLVES * nfe))
    return found


def line(name: str, row: Row, found: dict[str, dict]) -> list[str]:
    """A row of the table; the second form is ours."""
    base, own = (found[form] for form in row.forms)
    medians = [statistics.median(form["seconds"]) for form in (base, own)]
    ratios = [a / b for a, b in zip(base["seconds"], own["seconds"], strict=True)]
    cells = [name, " / ".join(row.forms), *(f"{1e3 * seconds:.3g}" for seconds in medians)]
    evaluations = ("+".join(map(str, form["nfe"])) for form in (base, own))
    cells += [f"**{statistics.median(ratios):.2f}**", " / ".join(evaluations)]
    for kind in ("resident", "tensors"):
        both = [form.get(kind, 0) / 2**20 for form in (base, own)]
        cells.append(" / ".join(f"{used:.1f}" for used in both) if all(both) else "-")
    adjoints = [form.get("adjoint_residual") for form in (base, own)]
    cells.append(" / ".join("-" if r is None else f"{r:.0e}" for r in adjoints))
    last = [form["losses"][-1:] for form in (base, own)]
    cells.append(f"{abs(last[1][0] / last[0][0] - 1):.0e}" if all(last) else "-")
    return cells


HEAD = [
    "row",
    "forms",
    "ms",
    "ms",
    "ratio",
    "evaluations",
    "resident MiB",
    "tensors MiB",
    "residuals of the adjoint",
    "loss diff",
]


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_steps.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    least = {"repeats": 1}
    parser = Parser(prog="bench_steps.py", description=__doc__.splitlines()[0], least=least)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas between them")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each row")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    names = chosen("--rows", args.rows, ROWS)
    torch.set_num_threads(1)
    figures: dict = {"machine": describe_machine(CPU), "rows": {}}
    print(figures["machine"], flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DEQWarning)  # a threshold ends every solve
        for name in names:
            row = ROWS[name]
            measure = measure_solver if row.model == "tiny" else measure_steps
            figures["rows"][name] = found = measure(row, args.repeats)
            print(", ".join(line(name, row, found)), file=sys.stderr, flush=True)
            write_json(args.json, figures)
    print(report(figures))


def report(figures: dict) -> str:
    """The table of what ``--json`` wrote."""
    rows = figures["rows"].items()
    return table(HEAD, [line(name, ROWS[name], found) for name, found in rows])


if __name__ == "__main__":
    sys.exit(main())
