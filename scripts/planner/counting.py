"""FLOPs and memory of a training step, counted on the model itself without computing it.

The model is built on the meta device, where operations have shapes but no values. The solvers are
replaced by ones that evaluate f as often as their threshold says. Differences between such steps
are the cost of an evaluation forward, of a product with the Jacobian backward, and of the rest.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deq_sequence.embedding
import deq_sequence.softmax
from deq_sequence import schedules as word_schedules
from deq_sequence.command import build_model
from deq_sequence.embedding import cluster_bounds, cluster_of
from deq_sequence.options import cutoffs_for
from lib.errors import DEQWarning
from lib.solvers import get_solver
from mdeq_vision import MDEQClsNet, MDEQSegNet
from mdeq_vision import schedules as image_schedules
from planner.live_bytes import LiveBytes
from planner.runs import Run, most_evaluations

STACKED, EQUILIBRIUM, JACOBIAN = "stacked", "equilibrium", "with the Jacobian loss"
_TOY = 4096  # elements of the state on which a solver's own memory is counted


@dataclass(frozen=True)
class Flops:
    """Of one sample: matrix products and convolutions, a multiplication and an addition each."""

    forward: float  # one evaluation of f
    backward: float  # one product with its Jacobian
    once: float  # of a forward pass beside the evaluations: what does not depend on z, and the head
    rest: float  # of a step at equilibrium beside the solves; ``once`` is a part of it
    jacobian: float  # of the Jacobian loss
    stacked: float  # a step of the stacked phase


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; the activations are those of one part of the batch."""

    weights: int
    gradients: int
    optimizer: int
    data: int  # batch, and the memory of a language model
    kept: dict[str, int]  # by phase: between forward and backward
    solver: int  # history of the solver that keeps more
    peaks: dict[str, int]  # by phase: most at once of all this and of what is needed for a moment


class Counter:
    """A run's model on the meta device, with a batch of ``samples``."""

    def __init__(self, run: Run, samples: int):
        self.run, self.samples = run, samples
        self.model = _build(run)
        self.history = 0.0  # of the solvers, in states

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step(self, f_thres: int, b_thres: int, *, at: int | None = None, jac: bool = False):
        """Forward and backward pass of a step; returns the loss, before the latter."""
        run = self.run
        options = {"f_thres": f_thres, "b_thres": b_thres, "compute_jac_loss": jac}
        options["train_step"] = run.border if at is None else at
        self.model.f_solver = self.model.b_solver = self._solver
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", DEQWarning)  # the solvers here solve nothing
            if run.words:
                stack.enter_context(_clusters(run, self.samples))
                loss, jac_loss, *_ = self.model(*self.data[:2], list(self.data[2:]), **options)
            else:
                loss, jac_loss, _ = self.model(self.data[0], **options)
                loss = image_loss(run, loss, self.data[1])
        return loss.mean() + jac_loss.mean() if jac else loss.mean()

    def activations(self, **options) -> tuple[int, int]:
        """Bytes that are kept between forward and backward, and the most at once in a step, with
        its gradients; weights, optimiser and data are not among them."""
        model = self.model
        model.zero_grad(set_to_none=True)
        with LiveBytes([*model.parameters(), *model.buffers(), *self.data]) as live:
            loss = self.step(2, 2, **options)
            kept = live.live
            loss.backward()
        model.zero_grad(set_to_none=True)
        return kept, live.peak

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        run, n = self.run, self.samples
        if run.words:
            args = run.settings
            words = torch.empty(args.tgt_len, n, dtype=torch.long, device="meta")
            memory = torch.empty(args.mem_len, n, args.d_model, device="meta")
            u = torch.empty(args.mem_len, n, 3 * args.d_model, device="meta")
            return (words, words.clone(), *((memory, u) if args.mem_len else ()))
        width, height = run.image_size
        label = (n, height, width) if run.segments else (n,)
        labels = torch.empty(label, dtype=torch.long, device="meta")
        return torch.empty(n, 3, height, width, device="meta"), labels

    def _solver(self, f, x0: Tensor, threshold: int, stop_mode: str = "rel") -> dict:
        """A solver that evaluates f ``threshold`` times, and holds as much as the real one."""
        held = x0.new_empty(round(self.history * x0.numel()))
        z = x0.mul_(1.0)  # in place, so that the adjoint does not take it for its untouched start
        for _ in range(threshold):
            result = f(z)
        del held
        trace = [1e-3] * threshold
        found = {"result": result, "nstep": 0, "nfe": threshold, "products": 0}
        return found | {"abs_trace": trace, "rel_trace": trace, "lowest": 1e-3, "eps": 1e-3}


def phases(run: Run) -> dict[str, dict]:
    """Options of :meth:`Counter.step` for each kind of step that the run has."""
    found: dict[str, dict] = {STACKED: {"at": 0}} if run.border else {}
    found[EQUILIBRIUM] = {}
    if run.jac_share:
        found[JACOBIAN] = {"jac": True}
    return found


def count_flops(run: Run) -> tuple[Flops, int]:
    """FLOPs per sample, and the number of parameters."""
    samples = 1 if run.words else 2  # batch norm needs more than one value
    counter = Counter(run, samples)

    def cost(f_thres: int = 1, b_thres: int = 1, **options) -> float:
        return counted(lambda: counter.step(f_thres, b_thres, **options).backward()) / samples

    base = cost()
    forward, backward = cost(2, 1) - base, cost(1, 2) - base
    with torch.no_grad():
        ahead = counted(lambda: counter.step(1, 1)) / samples
    return Flops(
        forward=forward,
        backward=backward,
        once=ahead - 2 * forward,  # the solver's evaluation, and one more for the graph
        rest=base - forward - backward,
        jacobian=cost(jac=True) - base if run.jac_share else 0.0,
        stacked=cost(at=0) if run.border else 0.0,
    ), counter.parameters


def counted(action: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions of ``action``."""
    counter = FlopCounterMode(display=False)
    with counter:
        action()
    return counter.get_total_flops()


def count_memory(run: Run, samples: int) -> Memory:
    """Memory of a step on a GPU that takes ``samples`` at once, in float32."""
    counter = Counter(run, samples)
    model = counter.model
    weights = _bytes([*model.parameters(), *model.buffers()])
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    optimizer = _optimizer_bytes(run, model)
    data = _bytes(counter.data)
    f_thres, b_thres = run.thresholds
    forward, backward = run.solvers
    histories = [
        solver_states(forward, round(f_thres)),
        solver_states(backward, round(b_thres)) if run.grad.startswith("ift") else 0.0,
    ]
    fixed = weights + optimizer + data
    kept, peaks = {}, {}
    for phase, options in phases(run).items():
        counter.history = 0.0 if phase == STACKED else max(histories)
        kept[phase], peak = counter.activations(**options)
        peaks[phase] = fixed + max(peak, gradients)
    size = _state_bytes(counter)
    solver = round(max(histories) * size)
    return Memory(weights, gradients, optimizer, data, kept, solver, peaks)


def _state_bytes(counter: Counter) -> int:
    sizes = []
    solve = counter._solver

    def noting(f, x0: Tensor, *args, **options) -> dict:
        sizes.append(x0.nbytes)
        return solve(f, x0, *args, **options)

    with patch.object(counter, "_solver", noting), torch.no_grad():
        counter.step(1, 1)
    return sizes[0] if sizes else 0


@cache
def solver_states(solver: str, threshold: int) -> float:
    """The most that a solver holds at once beside its start, in states; f's value is a part."""

    def f(z: Tensor) -> Tensor:
        return z.roll(1, 1)

    x0 = torch.randn(1, _TOY, generator=torch.Generator().manual_seed(0))
    solve = get_solver(solver, adjoint=solver.partition(":")[0] in ("gmres", "bicgstab"))
    with LiveBytes([x0]) as live:
        solve(f, x0, threshold=threshold, eps=0.0)
    return max(live.peak / x0.nbytes - 1, 0.0)  # f's value is counted with f


def evaluations(run: Run, flops: Flops) -> tuple[float, float]:
    """Evaluations of f, and products with its Jacobian, of solves that run to their thresholds."""
    (forward, backward), (f_thres, b_thres) = run.solvers, run.thresholds
    f_evals = most_evaluations(forward, f_thres)
    # J'0 is known; a gradient that solves for nothing makes no products.
    b_evals = most_evaluations(backward, b_thres) - 1 if flops.backward else 0.0
    return f_evals, b_evals


def _build(run: Run) -> nn.Module:
    with torch.device("meta"):
        if run.words:
            run.settings.compile = False
            vocabulary = SimpleNamespace(vocab=range(run.size[0]))
            return build_model(run.settings, vocabulary, torch.device("meta")).train()
        cfg = run.settings.clone()
        cfg.defrost()
        cfg.COMPILE = False
        cfg.freeze()
        return (MDEQSegNet if run.segments else MDEQClsNet)(cfg).train()


def random_words(run: Run, samples: int) -> Tensor:
    """Words of a batch, (tgt_len * samples,), as frequent as in a natural text (Zipf)."""
    weights = 1 / torch.arange(1, run.size[0] + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    n = samples * run.settings.tgt_len
    return torch.multinomial(weights, n, replacement=True, generator=generator)


@contextmanager
def _clusters(run: Run, samples: int) -> Iterator[None]:
    """In place of the numbers of rare words in a batch, which have no values here, those of
    :func:`random_words`."""
    words = random_words(run, samples)
    bounds = cluster_bounds(run.size[0], cutoffs_for(run.settings, run.size[0]))
    counts = torch.bincount(cluster_of(words, bounds), minlength=len(bounds)).tolist()

    def found(cluster: Tensor, n_clusters: int) -> list[Tensor]:
        return [torch.empty(k, dtype=torch.long, device="meta") for k in counts]

    with (
        patch.object(deq_sequence.embedding, "rows_by_cluster", found),
        patch.object(deq_sequence.softmax, "rows_by_cluster", found),
    ):
        yield


def image_loss(run: Run, output: Tensor, labels: Tensor) -> Tensor:
    if run.segments:
        output = nn.functional.interpolate(output, labels.shape[-2:], mode="bilinear")
    return nn.functional.cross_entropy(output, labels, reduction="sum")


def _optimizer_bytes(run: Run, model: nn.Module) -> int:
    """Of the state of all parameters, from one update of a small one beside them."""
    make = word_schedules.make_optimizer if run.words else image_schedules.make_optimizer
    optimizer = make(run.settings, model, _plain_optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    found = _bytes(v for v in states if isinstance(v, Tensor))
    model.zero_grad(set_to_none=True)
    return found


def _plain_optimizer(kind: type, model: nn.Module, **options) -> torch.optim.Optimizer:
    return kind(model.parameters(), **options)


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)
