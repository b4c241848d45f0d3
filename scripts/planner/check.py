"""The planner's counts beside those of PyTorch's profiler, for the same run on the CPU.

The model has its full width; batch, lengths and images are small, and solves have few evaluations.
The profiler sees the real solvers. It gives no FLOPs for the backward of a convolution and for
fused attention: those follow from the shapes that it recorded.
"""

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from deq_sequence.command import build_model
from lib.errors import DEQWarning
from lib.solvers import get_solver
from mdeq_vision import MDEQClsNet, MDEQSegNet
from planner.counting import (
    EQUILIBRIUM,
    JACOBIAN,
    STACKED,
    Counter,
    count_flops,
    evaluations,
    image_loss,
    phases,
    random_words,
    solver_states,
)
from planner.runs import Run

THRESHOLD = 4  # of both solves
_BACKWARD = "the backward pass"  # marks its begin in a profile
_LENGTH = 24  # of a segment, and of the memory
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::conv2d")


def small(run: Run) -> Run:
    """The run at full width, with sizes for a CPU."""
    if run.words:
        args = deepcopy(run.settings)
        args.tgt_len, args.mem_len = min(args.tgt_len, _LENGTH), min(args.mem_len, _LENGTH)
        args.batch_size, args.batch_chunk, args.rand_f_thres_delta = 1, 1, 0
        args.f_thres, args.b_thres = THRESHOLD, THRESHOLD
        return replace(run, settings=args)
    cfg = run.settings.clone()
    cfg.defrost()
    # So that every branch has some pixels.
    side = 2 ** (cfg.MODEL.DOWNSAMPLE_TIMES + cfg.MODEL.EXTRA.FULL_STAGE.NUM_BRANCHES)
    width, height = run.image_size
    size = [min(width, 2 * side), min(height, 2 * side)]
    cfg.MODEL.IMAGE_SIZE = cfg.TRAIN.IMAGE_SIZE = size
    cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.BATCH_CHUNK = 2, 1
    cfg.DEQ.F_THRES, cfg.DEQ.B_THRES, cfg.DEQ.RAND_F_THRES_DELTA = THRESHOLD, THRESHOLD, 0
    cfg.freeze()
    return replace(run, settings=cfg)


def check(run: Run) -> list[dict]:
    """Counted and measured FLOPs and bytes of each kind of step of the run."""
    run = small(run)
    flops, _ = count_flops(run)
    f_evals, b_evals = evaluations(run, flops)
    solved = flops.rest + f_evals * flops.forward + b_evals * flops.backward
    counted = {
        STACKED: flops.stacked,
        EQUILIBRIUM: solved,
        JACOBIAN: solved + flops.jacobian,
    }
    counter = Counter(run, run.batch)
    forward, backward = run.solvers
    history = max(solver_states(forward, THRESHOLD), solver_states(backward, THRESHOLD))
    found = []
    for phase, options in phases(run).items():
        counter.history = 0.0 if phase == STACKED else history
        kept, peak = counter.activations(**options)
        seen = _Real(run).measure(phase)
        found.append(
            {
                "run": run.name,
                "phase": phase,
                "flops": {"counted": run.batch * counted[phase], "profiler": seen["flops"]},
                "kept_bytes": {"counted": kept, "profiler": seen["kept"]},
                "peak_bytes": {"counted": peak, "profiler": seen["peak"]},
                "evaluations": {"counted": [f_evals, b_evals], "profiler": seen["nfe"]},
            }
        )
    return found


class _Real:
    """The model with values, on the CPU, with solvers that run to their thresholds."""

    def __init__(self, run: Run):
        self.run = run
        torch.manual_seed(0)
        n = run.batch
        if run.words:
            args, vocab = run.settings, run.size[0]
            self.model = build_model(args, SimpleNamespace(vocab=range(vocab)), torch.device("cpu"))
            words = random_words(run, n).view(-1, n)
            shape = args.mem_len, n, args.d_model
            memory = [torch.zeros(shape), torch.zeros(*shape[:2], 3 * args.d_model)]
            self.data = [words, words, *(memory if args.mem_len else [])]
        else:
            self.model = (MDEQSegNet if run.segments else MDEQClsNet)(run.settings)
            width, height = run.image_size
            shape = (n, height, width) if run.segments else (n,)
            self.data = [torch.randn(n, 3, height, width), torch.randint(run.size[0], shape)]
        self.model.train()
        for which, name in zip(("f_solver", "b_solver"), run.solvers, strict=True):
            setattr(self.model, which, _to_the_end(get_solver(name, adjoint=which[0] == "b")))

    def loss(self, phase: str) -> Tensor:
        run = self.run
        options = {
            "f_thres": THRESHOLD,
            "b_thres": THRESHOLD,
            "compute_jac_loss": phase == JACOBIAN,
        }
        options["train_step"] = 0 if phase == STACKED else run.border
        if run.words:
            loss, jac_loss, *_ = self.model(*self.data[:2], self.data[2:], **options)
        else:
            output, jac_loss, _ = self.model(self.data[0], **options)
            loss = image_loss(run, output, self.data[1])
        return loss.mean() + jac_loss.mean() if phase == JACOBIAN else loss.mean()

    def measure(self, phase: str) -> dict:
        """What the profiler sees of one step. Call it once: from then on the model holds its
        normalised weights."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line per profile
        with (
            warnings.catch_warnings(),
            profile(
                activities=[ProfilerActivity.CPU],
                record_shapes=True,
                profile_memory=True,
                with_flops=True,
            ) as profiler,
        ):
            warnings.simplefilter("ignore", DEQWarning)
            loss = self.loss(phase)
            with record_function(_BACKWARD):
                loss.backward()
        flops = sum(_flops(event) for event in profiler.events())
        events = profiler.profiler.kineto_results.events()
        border = min(e.start_ns() for e in events if e.name() == _BACKWARD)
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = list(accumulate(size for _, size in changes))
        kept = [bytes_ for bytes_, (when, _) in zip(held, changes, strict=True) if when < border]
        stats = self.model.deq.stats
        nfe = [0, 0]
        if phase != STACKED:
            # Of a backward solve the first evaluation, at zero, is known.
            nfe = [stats.forward.last["nfe"], stats.backward.last.get("nfe", 1) - 1]
        return {"flops": flops, "kept": kept[-1], "peak": max(held), "nfe": nfe}


def _to_the_end(solver: Callable[..., dict]) -> Callable[..., dict]:
    """The solver without a tolerance. Its result counts as good: a bad adjoint, as after a few
    evaluations here, would cost one product more."""

    def solve(f, x0: Tensor, threshold: int, stop_mode: str = "rel") -> dict:
        found = solver(f, x0, threshold=threshold, eps=0.0, stop_mode=stop_mode)
        return found | {"norms": 0 * found["norms"]}

    return solve


def _flops(event) -> float:
    if event.name in _PRODUCTS:
        return event.flops or 0
    if event.name == "aten::convolution_backward":
        gradient, _, weight = event.input_shapes[:3]
        # Gradients of input and weight; that of a bias takes no product.
        wanted = str(event.concrete_inputs[-1]).split(",")[:2]
        return 2 * prod(gradient) * prod(weight[1:]) * sum("True" in one for one in wanted)
    parent = event.cpu_parent.name if event.cpu_parent is not None else ""
    if event.name == "aten::convolution" and parent == "aten::_convolution_double_backward":
        return _convolution(*event.input_shapes[:2], *event.concrete_inputs[3:7])
    if event.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        query, key = event.input_shapes[:2]
        return 4 * prod(query) * key[-2]
    return 0


def _convolution(x, weight, stride, padding, dilation, transposed) -> float:
    """FLOPs of a convolution of these shapes."""
    if transposed:
        return 2 * prod(x) * prod(weight[1:])
    sides = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    pixels = prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    return 2 * x[0] * pixels * prod(weight)


def check_table(found: list[dict]) -> dict[str, list]:
    """Head and rows of a table of what :func:`check` found: counted / profiler, and their ratio."""
    head = ["run", "step", "MFLOP", "ratio", "kept MiB", "ratio", "peak MiB", "ratio"]
    rows = []
    for record in found:
        row = [record["run"], record["phase"]]
        for name, unit in (("flops", 1e6), ("kept_bytes", 2**20), ("peak_bytes", 2**20)):
            counted, seen = record[name]["counted"], record[name]["profiler"]
            row += [f"{counted / unit:,.1f} / {seen / unit:,.1f}", f"{counted / seen:.3f}"]
        rows.append(row)
    return {"head": head, "rows": rows}
