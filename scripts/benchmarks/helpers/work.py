"""What a training step of a published setting computes and sends, counted at its published size.

One sample goes through the model with solvers that evaluate f a fixed number of times; the
differences between such steps are the cost of one evaluation forward, of one product with the
Jacobian backward, of the Jacobian loss, and of all the rest. Image models are counted on the meta
device, where nothing is computed; language models, whose softmax depends on the words, on the CPU.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deq_sequence.command import build_model
from helpers.settings import (
    LANGUAGE,
    PUBLISHED_GPUS,
    SIZES,
    WT103_WORDS,
    Options,
    image_config,
    language_arguments,
)
from lib.solvers import SOLVERS
from mdeq_vision import MDEQClsNet, MDEQSegNet

IMAGES = {"cifar10": 50_000, "imagenet": 1_281_167, "cityscapes": 2_975}  # to train on
# Bytes of gradients, at least, that DistributedDataParallel sends together: first, and later on.
BUCKETS = (2**20, 25 * 2**20)
_TOY = 64  # size of the state on which a solver's own operations are counted


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products and convolutions, and operations that start a kernel."""

    flops: float
    kernels: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.flops - other.flops, self.kernels - other.kernels)


@dataclass(frozen=True)
class Work:
    """One published setting. Costs are for one sample.

    Evaluations are those of solves that run to their thresholds, the mean where these vary.
    """

    name: str
    batch: int  # of all GPUs, as published
    gpus: int
    steps: int  # of the whole run
    stacked_steps: int  # of them
    f_solver: str
    b_solver: str
    f_evals: float  # evaluations of f
    b_evals: float  # products with its Jacobian
    jac_share: float  # share of the equilibrium's steps with the Jacobian loss
    parameters: int  # distinct ones; a gradient of 4 bytes each is summed over all processes
    buckets: int  # sums in which the gradients travel
    norms: int  # batch norms, which communicate once forward and once backward
    state: int  # elements of the state that the solvers iterate
    forward: Cost  # of one evaluation of f
    backward: Cost  # of one product with its Jacobian
    jacobian: Cost  # of the Jacobian loss
    rest: Cost  # of the step beside the solvers
    stacked: Cost  # of a stacked step
    solver_kernels: tuple[float, float]  # forward and backward, per evaluation

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters

    @property
    def collectives(self) -> int:
        """Per step: gradients, batch norms, and the counts that steer a step."""
        counts = 1 if self.name in LANGUAGE else 2
        return self.buckets + 2 * self.norms + counts

    def flops(self, samples: int = 1) -> float:
        """Of a step of the equilibrium phase whose solves run to their thresholds."""
        each = self.f_evals * self.forward.flops + self.b_evals * self.backward.flops
        return samples * (each + self.jac_share * self.jacobian.flops + self.rest.flops)


@cache
def count(name: str, size: str = "full") -> Work:
    """Count a published setting."""
    options = Options(size=SIZES[size], device=torch.device("cpu"), batch=1)
    return (_words if name in LANGUAGE else _images)(name, options)


def _words(name: str, options: Options) -> Work:
    args = language_arguments(name, options)
    published = language_arguments(name, Options(size=SIZES["full"], device=options.device))
    words = WT103_WORDS if options.size is SIZES["full"] else options.vocab
    torch.manual_seed(options.seed)
    model = build_model(args, SimpleNamespace(vocab=range(words)), "cpu").train()
    frequencies = 1 / torch.arange(1, words + 1, dtype=torch.float64)
    text = torch.multinomial(frequencies, args.mem_len + args.tgt_len + 1, replacement=True)[
        :, None
    ]
    # As in the middle of a text, where the memory is full.
    shape = args.mem_len, 1, args.d_model
    memory = [torch.zeros(shape), torch.zeros(*shape[:2], 3 * args.d_model)]
    data, target = text[-args.tgt_len - 1 : -1], text[-args.tgt_len :]

    def loss(step: int, jac: bool) -> Tensor:
        found, jac_loss, *_ = model(data, target, memory, train_step=step, compute_jac_loss=jac)
        return found.mean() + jac_loss.mean()

    freq = args.jac_loss_freq if args.jac_loss_weight > 0 else 0.0
    return Work(
        name=name,
        batch=PUBLISHED_GPUS * published.batch_size,
        gpus=PUBLISHED_GPUS,
        steps=args.max_step,
        stacked_steps=args.pretrain_steps,
        f_evals=most_evaluations(args.f_solver, args.f_thres - args.rand_f_thres_delta / 2),
        b_evals=most_evaluations(args.b_solver, args.b_thres) - 1,  # J'0 is known
        jac_share=freq,
        state=args.tgt_len * args.d_model,
        **_counts(model, args.f_solver, args.b_solver, loss, args.pretrain_steps),
    )


def _images(name: str, options: Options) -> Work:
    cfg = image_config(name, options)
    published = image_config(name, Options(size=SIZES["full"], device=options.device))
    segments = name.startswith("cityscapes")
    width, height = cfg.TRAIN.IMAGE_SIZE if segments else cfg.MODEL.IMAGE_SIZE
    batch = published.TRAIN.BATCH_SIZE_PER_GPU * len(cfg.GPUS)
    images, epochs = IMAGES[cfg.DATASET.DATASET], cfg.TRAIN.END_EPOCH
    per_epoch = images // batch if segments else -(-images // batch)
    stacked = min(cfg.TRAIN.PRETRAIN_STEPS, epochs * per_epoch)
    until = min(cfg.LOSS.JAC_STOP_EPOCH, epochs) * per_epoch  # the last step with a Jacobian loss
    jac = cfg.LOSS.JAC_LOSS_FREQ if cfg.LOSS.JAC_LOSS_WEIGHT > 0 else 0.0
    later = max(epochs * per_epoch - stacked, 1)
    sizes = []

    def note(solution_shape: torch.Size) -> None:
        sizes.append(solution_shape[1:].numel())

    with torch.device("meta"):
        model = (MDEQSegNet if segments else MDEQClsNet)(cfg).train()
        # Two, as batch norm needs more than one value; costs are halved below.
        x = torch.empty(2, 3, height, width)

    def loss(step: int, jac_loss: bool) -> Tensor:
        output, found, _ = model(x, train_step=step, compute_jac_loss=jac_loss)
        return output.sum() + found.sum()

    counts = _counts(
        model, cfg.DEQ.F_SOLVER, cfg.DEQ.B_SOLVER, loss, cfg.TRAIN.PRETRAIN_STEPS, 2, note
    )
    return Work(
        name=name,
        batch=batch,
        gpus=len(cfg.GPUS),
        steps=epochs * per_epoch,
        stacked_steps=stacked,
        f_evals=most_evaluations(cfg.DEQ.F_SOLVER, cfg.DEQ.F_THRES),
        b_evals=most_evaluations(cfg.DEQ.B_SOLVER, cfg.DEQ.B_THRES) - 1,  # J'0 is known
        jac_share=jac * max(0, until - stacked) / later,
        state=sizes[0],
        **counts,
    )


def _counts(
    model: nn.Module,
    f_solver: str,
    b_solver: str,
    loss: Callable[[int, bool], Tensor],
    border: int,
    samples: int = 1,
    note: Callable[[torch.Size], None] = lambda shape: None,
) -> dict:
    """What is counted the same way for both kinds of model."""

    def cost(forward: int, backward: int, *, step: int = border, jac: bool = False) -> Cost:
        model.f_solver = _evaluating(forward, note)
        model.b_solver = _evaluating(backward, lambda shape: None)
        found = counted(lambda: loss(step, jac).backward())
        return Cost(found.flops / samples, found.kernels)

    base = cost(1, 1)
    forward, backward = cost(2, 1) - base, cost(1, 2) - base
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return {
        "f_solver": f_solver,
        "b_solver": b_solver,
        "parameters": sum(p.numel() for p in model.parameters()),
        "buckets": buckets([4 * p.numel() for p in model.parameters()]),
        "norms": norms,
        "forward": forward,
        "backward": backward,
        "jacobian": cost(1, 1, jac=True) - base,
        "rest": base - forward - backward,
        "stacked": cost(1, 1, step=0),
        "solver_kernels": (solver_kernels(f_solver), solver_kernels(b_solver)),
    }


def buckets(sizes: list[int]) -> int:
    """How many sums the gradients of these bytes travel in: they are collected from the last one
    on, and sent when there are enough."""
    count, collected = 0, 0
    for size in reversed(sizes):
        collected += size
        if collected >= BUCKETS[min(count, 1)]:
            count, collected = count + 1, 0
    return count + (collected > 0)


def _evaluating(times: int, note: Callable[[torch.Size], None]) -> Callable:
    """A solver that evaluates f ``times`` times and computes nothing itself."""

    def solve(f, x0: Tensor, threshold: int, stop_mode: str = "rel", **options) -> dict:
        note(x0.shape)
        z = x0.mul_(1.0)  # in place, so that the adjoint does not take it for its untouched start
        for _ in range(times):
            result = f(z)
        trace = [1e-3] * times
        return {"result": result, "nstep": 0, "nfe": times, "abs_trace": trace, "rel_trace": trace}

    return solve


@cache
def solver_kernels(name: str) -> float:
    """Operations of a solver per evaluation of f, beside f."""

    def cost(threshold: int) -> float:
        return counted(lambda: _toy_solve(name, threshold)).kernels

    return (cost(24) - cost(12)) / 12 - 1


def most_evaluations(solver: str, threshold: float) -> float:
    """Evaluations of f of a solve that runs to its threshold: one more with some solvers."""
    found = _toy_solve(solver, 12)
    return threshold + max(found["nfe"] + found["products"] - 12, 0)


def _toy_solve(name: str, threshold: int) -> dict:
    def f(z: Tensor) -> Tensor:
        return z.roll(1, 1)  # one operation, and nothing that is solved in a few steps

    x0 = torch.randn(1, _TOY, generator=torch.Generator().manual_seed(0))
    return SOLVERS[name](f, x0, threshold=threshold, eps=0.0)


def counted(action: Callable[[], object]) -> Cost:
    """FLOPs and kernels of ``action``."""
    counter, kernels = FlopCounterMode(display=False), _Kernels()
    with counter, kernels:
        action()
    return Cost(counter.get_total_flops(), kernels.counts.total())


class _Kernels(TorchDispatchMode):
    """Counts operations that compute: not views, and not the making of an uninitialised tensor."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (function.is_view or "empty" in name or name in ("_unsafe_view", "detach")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
