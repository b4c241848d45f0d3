"""Time a training step on a GPU with CUDA graphs, and without the host's reads.

    python scripts/benchmarks/bench_graph.py --json graph.json

These forms of a step take turns in one process, the last one after the others:

    plain        as first published (scripts/benchmarks/helpers/plain_*.py)
    fast         ours: the host reads the residual after every evaluation
    unread       ours with check_every: the host reads once, at the end of a solve
    graph        ours with CUDA graphs of f and of its products (--graph)
    graph-unread both
    graph-bf16   CUDA graphs, bfloat16 inside f
    compile      ours, f through torch.compile

All but the first are modes of one model. "ms" is the median time of a step, "busy" the share of it
in which the GPU computes (torch.profiler), "host ms" the time until the host has started all work
of a step, "reads" how often the host waits for the GPU in it, "nfe" evaluations forward/backward.
"MiB" is what graphs hold. On a CPU, sizes are tiny, and graphs are left out with a warning.

The last figures compare the gradient of a form to that of "fast" in the same number format, from
the same weights, memory and data. For them f gets a twentieth of z and a fixed random state, so
that it contracts and the solves end. As published they do not: the rounding of f then decides which
iterate and which adjoint is taken, and changes the gradient by a tenth. "gradient" is the relative
difference, "spread" that of "fast" itself if f has noise as large as its rounding. "times" is the
largest difference of a parameter's gradient in units of its own spread: some units for rounding,
many for a mistake. Relative to its own norm it says nothing: a convolution's bias before a batch
norm has the gradient zero, for which rounding puts any number.
"""

import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
import torch.profiler as profiler
from helpers.arguments import Parser, write_json
from helpers.gpu import _own_time, _Waits
from helpers.measure import describe_machine, in_turns, synchronize, table
from helpers.settings import FORMS, SIZES, Options, chosen_settings
from helpers.steps import run_step
from helpers.tasks import Task, make_task
from torch import Tensor
from torch.utils._pytree import tree_map

from lib.deq import DEQWarning
from lib.graphs import Graphs
from lib.runs.command_line import exit_code
from lib.solvers import SOLVERS
from lib.solvers.maps import Map, transformed
from lib.solvers.precision import allow_tf32

SETTINGS = "wt103_deq_transformer_reg,cifar/cls_mdeq_TINY,imagenet/cls_mdeq_SMALL"
SETTINGS += ",cityscapes/seg_mdeq_SMALL"
MODES = ("fast", "unread", "graph", "graph-unread", "graph-bf16")
ALL = ("plain", *MODES, "compile")
UNREAD = 1000  # check_every: more than any threshold
NOISY = 3  # gradients with noise, for the spread
WARMUP = 3  # the memory of words has its full length from the second step on


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_graph.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Measure setting by setting; print a table and write the figures after each."""
    parser = Parser(prog="bench_graph.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", default=SETTINGS, help="names; or language, images, all")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each form")
    parser.add_argument("--seconds", type=float, default=230.0, help="to begin something new in")
    parser.add_argument("--without", default="", help="forms to leave out")
    args = parser.parse_args(argv)
    allow_tf32(False)
    warnings.simplefilter("ignore", DEQWarning)  # thresholds cut solves short, as published
    warnings.filterwarnings("always", "no CUDA graph", DEQWarning)
    deadline = time.monotonic() + args.seconds
    print(describe_machine(args.device) + "\n", flush=True)
    figures = {"machine": describe_machine(args.device), "settings": {}}
    for name in chosen_settings(args.settings):
        if time.monotonic() > deadline:
            print(f"{name}: left out, no time left")
            continue
        start = time.monotonic()
        found = Setting(name, args, deadline).measured()
        figures["settings"][name] = found
        write_json(args.json, figures)
        print(f"{name} ({time.monotonic() - start:.0f} s)\n\n{shown(found)}\n", flush=True)


def shown(found: dict[str, dict]) -> str:
    """The figures of a setting as a table."""
    head = ["form", "ms", "ratio", "busy", "GPU ms", "host ms", "reads", "nfe", "gradient"]
    head += ["spread", "times", "MiB", "first s"]
    first = next((f["ms"] for f in found.values() if f.get("ms")), None)
    rows = []
    for name, f in found.items():
        ratio = f"{first / f['ms']:.2f}" if f.get("ms") and first else ""
        names = "ms busy gpu_ms host_ms reads nfe gradient spread times".split()
        cells = [_text(f.get(k)) for k in names]
        cells.insert(1, ratio)
        rows.append([name, *cells, _text(f.get("graph_mib")), _text(f.get("first_s"))])
    return table(head, rows)


def step_times(settings: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: milliseconds of a step, setting by setting, without compilation."""
    forms = [form for form in ALL if form != "compile"]
    rows = [
        [name, *(_text(f.get(form, {}).get("ms")) for form in forms)]
        for name, f in settings.items()
    ]
    return ["ms of a step", *forms], rows


def _text(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


class Contracting:
    """z -> f(r + z / 20) for a random r: from graphs of its own, or with relative noise.

    Its random numbers are its own: dropout masks and the Jacobian loss have the same as without.
    """

    def __init__(self, device: torch.device):
        self.random = torch.Generator(device).manual_seed(0)
        self.graphs: Graphs | None = None  # which record no other map than this one
        self.noise = 0.0
        self._shifts: dict[torch.Size, Tensor] = {}

    def of(self, f: Map) -> Map:
        return transformed(self.graphs.of(f) if self.graphs else f, self._changed)

    def _changed(self, f: Map) -> Map:
        return lambda z: tree_map(self._noisy, f(tree_map(self._shifted, z)))

    def _shifted(self, t: Tensor) -> Tensor:
        if t.shape not in self._shifts:
            self._shifts[t.shape] = self._normal(t)
        return self._shifts[t.shape] + t / 20

    def _noisy(self, t: Tensor) -> Tensor:
        return t * (1 + self.noise * self._normal(t)) if self.noise else t

    def _normal(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self.random, device=t.device, dtype=t.dtype)


def differences(
    found: list[Tensor], expected: list[Tensor], noisy: list[list[Tensor]]
) -> dict[str, float]:
    """The figures "gradient", "spread" and "times" of a gradient, given per parameter."""

    def norms(gradient: list[Tensor]) -> Tensor:
        pairs = zip(gradient, expected, strict=True)
        return torch.stack([(a - b).double().norm() for a, b in pairs])

    spread = torch.stack([norms(gradient) for gradient in noisy]).amax(0)
    whole = torch.stack([b.double().norm() for b in expected]).norm()
    own = norms(found)
    least = 1e-8 * whole  # where a parameter has no spread: below the rounding of the whole
    return {
        "gradient": (own.norm() / whole).item(),
        "spread": (spread.norm() / whole).item(),
        "times": (own / spread.clamp(min=least)).amax().item(),
    }


class Setting:
    """The forms of one setting. What fails in one form is printed, and the others go on."""

    def __init__(self, name: str, args, deadline: float):
        self.name, self.args, self.device, self.deadline = name, args, args.device, deadline
        self.found: dict[str, dict] = {}
        self.tasks: dict[str, Task] = {}
        self.graphs = Graphs()
        self.index = 0

    def measured(self) -> dict[str, dict]:
        """The figures of all forms."""
        without = self.args.without.split(",")
        forms = [form for form in ALL if form not in without]
        for form in forms:
            self.found[form] = {}
        self._try("plain" if "plain" in forms else "fast", self._build, "plain" in forms)
        timed = [form for form in forms if form != "compile"]
        for form in timed:
            self._try(form, self._warm, form)
        ready = [form for form in timed if "error" not in self.found[form]]
        times: dict[str, list[float]] = {form: [] for form in ready}
        for _, form in in_turns(ready, self.args.rounds):
            self._try(form, lambda form=form: times[form].append(self._step(form)))
        for form in ready:
            self._note(form, times[form])
            self._try(form, self._inside, form)
        self._compare([form for form in ready if form != "plain"])
        if "compile" in forms and time.monotonic() + 45 < self.deadline:
            self._try("compile", self._compiled)
        return self.found

    def _try(self, form: str, action: Callable, *arguments) -> None:
        if "error" in self.found[form]:
            return
        try:
            action(*arguments)
        except Exception as error:  # of one form: the others go on
            print(f"{self.name}, {form}:\n{traceback.format_exc()}", flush=True)
            self.found[form]["error"] = f"{type(error).__name__}: {error}"[:500]

    def _build(self, with_plain: bool) -> None:
        size = SIZES["full" if self.device.type == "cuda" else "tiny"]
        make = partial(make_task, self.name, options=Options(size=size, device=self.device))
        self.tasks["ours"] = make(form=FORMS["fast"])
        self.thresholds = self.tasks["ours"].methods
        if with_plain:
            self.tasks["plain"] = make(form=FORMS["plain"])

    def _task(self, form: str) -> Task:
        """The task, set to a form."""
        if form == "plain":
            return self.tasks["plain"]
        task, model = self.tasks["ours"], self.tasks["ours"].model
        task.form = replace(FORMS["fast"], amp="bf16" if "bf16" in form else "none")
        model.deq.graphs = self.graphs if form.startswith("graph") else None
        options = {"check_every": UNREAD} if "unread" in form else {}
        model.f_solver, model.b_solver = (
            partial(SOLVERS[name], **options) for name in task.methods
        )
        return task

    def _step(self, form: str) -> float:
        task = self._task(form)
        self.index += 1
        parts, _ = run_step(task, self.index)
        return sum(parts)

    def _warm(self, form: str) -> None:
        start, before = time.monotonic(), self._reserved()
        for _ in range(WARMUP):
            self._step(form)
        self.found[form]["first_s"] = time.monotonic() - start
        if form.startswith("graph") and before is not None:
            self.found[form]["graph_mib"] = self._reserved() - before
            self.found[form]["graphs"] = sum(f is not None for f in self.graphs._forms.values())

    def _reserved(self) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() // 2**20

    def _note(self, form: str, times: list[float]) -> None:
        found, stats = self.found[form], self._task(form).model.deq.stats
        found["ms"] = 1e3 * statistics.median(times) if times else None
        found["all_ms"] = [1e3 * t for t in times]
        found["nfe"] = f"{stats.forward.last['nfe']}/{stats.backward.last['nfe']}"

    def _inside(self, form: str) -> None:
        """Where a step's time goes, how often the host waits in it, and its gradient."""
        found, task = self.found[form], self._task(form)
        self._step(form)
        stats = task.model.deq.stats
        found["nfe"] = f"{stats.forward.last['nfe']}/{stats.backward.last['nfe']}"
        found["host_ms"] = 1e3 * min(self._unmeasured(task) for _ in range(2))
        with _Waits(self.device) as waits:
            self._unmeasured(task)
        found["reads"] = waits.count
        if self.device.type == "cuda":
            kinds = profiler.ProfilerActivity
            torch.cuda.reset_peak_memory_stats()
            with profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
                self._unmeasured(task)
            found["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
            own = sum(_own_time(event, True) for event in profile.key_averages()) / 1e3
            found["gpu_ms"] = own
            found["busy"] = own / found["ms"] if found.get("ms") else None

    def _unmeasured(self, task: Task) -> float:
        """A step without waits at the borders of its parts; seconds until the host is done."""
        self.index += 1
        task.begin(self.index)
        synchronize(self.device)
        start = time.perf_counter()
        loss = task.loss()
        task.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        task.update()
        seconds = time.perf_counter() - start
        synchronize(self.device)
        return seconds

    def _compare(self, forms: list[str]) -> None:
        """The gradients of forms, all from the same weights, memory and data."""
        mems = getattr(self.tasks["ours"], "mems", None)
        contracting, own = Contracting(self.device), type(self.graphs)()

        def gradient(form: str, noise: float = 0.0, index: int = 10_000) -> list[Tensor]:
            task = self._task(form)
            model = task.model
            # eps 0: all forms evaluate equally often, also the one that does not look.
            model.f_solver, model.b_solver = (
                partial(solver, eps=0.0) for solver in (model.f_solver, model.b_solver)
            )
            contracting.graphs = own if model.deq.graphs is not None else None
            contracting.noise, model.deq.graphs = noise, contracting
            if mems is not None:
                task.mems = mems
            task.begin(index)
            task.optimizer.zero_grad(set_to_none=True)
            task.loss().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        @cache
        def reference(amp: str, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
            noisy = [gradient("fast" + amp, torch.finfo(dtype).eps) for _ in range(NOISY)]
            return gradient("fast" + amp), noisy

        def compare(form: str) -> None:
            low = "bf16" in form
            expected = reference(*(("-bf16", torch.bfloat16) if low else ("", torch.float32)))
            gradient(form, index=0)  # a graph gets other numbers than those of its recording
            self.found[form] |= differences(gradient(form), *expected)

        for form in forms:
            self._try(form, compare, form)

    def _compiled(self) -> None:
        task = self._task("compile")
        model, form = task.model, "compile"
        if hasattr(model, "func"):
            model.func.compile_evaluations()
        else:
            model.fullstage.compile_f = True
        self._warm(form)
        self._note(form, [self._step(form) for _ in range(self.args.rounds)])
        self._inside(form)
        self._compare([form])


if __name__ == "__main__":
    sys.exit(main())
