"""One training step of a setting in one form: model, optimiser, data.

All forms of a setting start from the same weights and see the same random tokens or images;
random numbers are seeded anew for every step, so that dropout masks and the vectors of the
Jacobian loss agree too. The steps are the first ones of the equilibrium phase: that is where the
published schedules of the learning rate and of the Jacobian loss stand.

The condition of the weights decides how long the solvers run. As initialised, f is nothing like
that of a trained model: language models stop at half of the published thresholds, and image models
have spectral radii of 1.2 or more and do not converge. So the weights are set to a condition with
a spectral radius around 1 and nfe near the published thresholds (the report prints both), by one
number, the *gain*:

- language: the norms of the weight-normalised matrices are multiplied by it. Weaker blocks leave
  more to the residual connection, whose Jacobian is the identity.
- images: the affine group norms of the blocks and of the fusion get it as their weight, and biases
  from N(0, 1 - gain^2) per channel, so that this share of what they pass on depends on z.

Learning rates are a thousandth of the published ones, so that the weights stay in this condition:
at the full rate, a few steps on noise without warm-up leave it. The optimiser's work is the same.
"""

import random
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_sequence import schedules as word_schedules
from deq_sequence.command import build_model
from helpers.plain_images import PlainClsNet, PlainSegNet
from helpers.plain_language import PlainTransformerLM
from helpers.plain_solvers import PLAIN, torchdeq_solver
from helpers.settings import LANGUAGE, Form, Options, image_config, language_arguments
from lib.graphs import Graphs
from lib.jacobian import jac_loss_weight_at
from lib.runs.optimizers import fused_if_possible
from lib.solvers import ADJOINT_SOLVERS, SOLVERS
from lib.solvers.precision import autocast
from mdeq_vision import MDEQClsNet, MDEQSegNet
from mdeq_vision import schedules as image_schedules
from mdeq_vision.losses import SegmentationLoss, mean_loss

POST_LN_GAIN, PRE_LN_GAIN = 0.6, 0.7
IMAGE_GAINS = {
    "cifar/cls_mdeq_TINY": 0.2,
    "cifar/cls_mdeq_LARGE": 0.65,
    "cifar/cls_mdeq_LARGE_reg": 0.65,
}
IMAGE_GAIN = 0.87  # of the others
RATE = 1e-3  # of the published learning rate
_STEPS_PER_EPOCH = 1000  # for schedules that count epochs


class Task:
    """The training step of one setting in one form."""

    unit: str  # tokens or images
    units: int  # of them per step
    gemm: tuple[int, int, int]  # (M, K, N) of a typical product of f, for the matrix rate
    with_jac: bool  # whether the step that was begun has the Jacobian loss
    methods: tuple[str, str]  # names of the forward and the backward solver

    def __init__(self, form: Form, options: Options, model: nn.Module):
        self.form, self.options, self.device = form, options, options.device
        self.model = model.to(options.device, options.dtype).train()
        if form.graph:
            self.model.deq.graphs = Graphs()

    def set_solvers(self, forward: str, backward: str) -> None:
        """Solvers by name, in the form's own implementation.

        The form's own solver of the adjoint replaces ``backward``.
        """
        backward = self.form.adjoint or backward
        self.methods = forward, backward
        self.model.f_solver, self.model.b_solver = self._solver(forward), self._solver(backward)

    def _solver(self, name: str):
        if self.form.plain and self.options.plain == "torchdeq":
            return torchdeq_solver(name)
        solver = (PLAIN if self.form.plain else SOLVERS | ADJOINT_SOLVERS)[name]
        if name == "anderson" and self.options.lam is not None:
            return partial(solver, lam=self.options.lam)
        return solver

    def seed(self, index: int) -> random.Random:
        """Seed step ``index``; the generator of the choices that are not the model's."""
        torch.manual_seed(1_000_003 * self.options.seed + index)
        return random.Random(7919 * self.options.seed + index)

    def is_regularised(self, index: int) -> bool:
        """Whether step ``index`` has the Jacobian loss."""
        self.begin(index)
        return self.with_jac

    def _frequency(self, published: float) -> float:
        return published if self.options.jac_freq is None else self.options.jac_freq

    def begin(self, index: int) -> None:
        """Seed the random numbers of step ``index`` (from 0) and make its data."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """Loss of the step that was begun, with its graph."""
        raise NotImplementedError

    def update(self) -> None:
        """Clip, set the learning rate of the step, and let the optimiser take it."""
        raise NotImplementedError

    def kept_bytes(self) -> int:
        """Bytes that stay between two steps: weights, gradients, optimiser state, memory."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [p.grad for p in self.model.parameters() if p.grad is not None]
        states = (value for state in self.optimizer.state.values() for value in state.values())
        kept += [*(v for v in states if isinstance(v, Tensor)), *getattr(self, "mems", [])]
        return sum(t.numel() * t.element_size() for t in kept)


class LanguageTask(Task):
    """A published run on random words, frequent ones first as in a text (Zipf); memory is
    carried from step to step."""

    unit = "tokens"

    def __init__(self, name: str, form: Form, options: Options):
        self.args = args = language_arguments(name, options)
        torch.manual_seed(options.seed)
        model = build_model(args, SimpleNamespace(vocab=range(options.vocab)), "cpu")
        gain = options.gain or (PRE_LN_GAIN if args.pre_lnorm else POST_LN_GAIN)
        with torch.no_grad():
            for key, parameter in model.func.named_parameters():
                if key.endswith("weight_g"):
                    parameter.mul_(gain)
        if form.plain:
            model.__class__ = PlainTransformerLM
        super().__init__(form, options, model)
        self.set_solvers(args.f_solver, args.b_solver)
        if form.compile:
            model.func.compile_evaluations()
        build = unfused if form.plain else fused_if_possible
        self.optimizer = word_schedules.make_optimizer(args, model, build)
        self.learning_rate = word_schedules.LearningRate(args, self.optimizer)
        self.mems: list[Tensor] = []
        self.b_thres = args.b_thres
        self.units = args.batch_size * args.tgt_len
        self.gemm = (self.units, args.d_model, args.d_inner)
        ranks = torch.arange(1, options.vocab + 1, dtype=torch.float64)
        self._frequencies = 1 / ranks

    def begin(self, index: int) -> None:
        args, rng = self.args, self.seed(index)
        self.step = args.pretrain_steps + index
        shape = args.tgt_len + 1, args.batch_size
        text = torch.multinomial(self._frequencies, shape[0] * shape[1], replacement=True)
        self.text = text.view(shape).to(self.device)
        self.f_thres = max(1, args.f_thres - rng.randint(0, args.rand_f_thres_delta))
        self.jac_weight = jac_loss_weight_at(
            self.step, args.jac_loss_weight, args.jac_incremental, args.pretrain_steps
        )
        self.with_jac = rng.random() < self._frequency(args.jac_loss_freq) and self.jac_weight > 0

    def loss(self) -> Tensor:
        with autocast(self.form.amp, self.device):
            loss, jac_loss, _, *self.mems = self.model(
                self.text[:-1],
                self.text[1:],
                self.mems,
                train_step=self.step,
                f_thres=self.f_thres,
                b_thres=self.b_thres,
                compute_jac_loss=self.with_jac,
            )
        nll = loss.to(self.options.dtype).mean()
        return nll + self.jac_weight * jac_loss.to(nll).mean() if self.with_jac else nll

    def update(self) -> None:
        if self.args.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        set_rate(self.optimizer, self.learning_rate.set(self.step))
        self.optimizer.step()


class ImageTask(Task):
    """A published image setting on noise with random labels."""

    unit = "images"

    def __init__(self, name: str, form: Form, options: Options):
        self.cfg = cfg = image_config(name, options, compile=form.compile)
        self.segments = name.startswith("cityscapes")
        nets = (PlainSegNet, MDEQSegNet) if self.segments else (PlainClsNet, MDEQClsNet)
        torch.manual_seed(options.seed)
        model = nets[0 if form.plain else 1](cfg)
        damp(model, options.gain or IMAGE_GAINS.get(name, IMAGE_GAIN))
        super().__init__(form, options, model)
        self.set_solvers(cfg.DEQ.F_SOLVER, cfg.DEQ.B_SOLVER)
        build = unfused if form.plain else fused_if_possible
        self.optimizer = image_schedules.make_optimizer(cfg, model, build)
        self.units, size = cfg.TRAIN.BATCH_SIZE_PER_GPU, cfg.MODEL.IMAGE_SIZE
        self.width, self.height = cfg.TRAIN.IMAGE_SIZE if self.segments else size
        self.b_thres = cfg.DEQ.B_THRES
        self.criterion = SegmentationLoss(
            ignore_label=cfg.TRAIN.IGNORE_LABEL,
            ohem=cfg.LOSS.USE_OHEM,
            ohem_thres=cfg.LOSS.OHEMTHRES,
            ohem_keep=cfg.LOSS.OHEMKEEP,
        )
        channels = cfg.MODEL.EXTRA.FULL_STAGE.NUM_CHANNELS
        branch = min(1, len(channels) - 1)  # all branches cost about the same: one of the larger
        shrink = 2 ** (cfg.MODEL.DOWNSAMPLE_TIMES + branch)
        pixels = max(1, self.units * (self.width // shrink) * (self.height // shrink))
        width = channels[branch]
        self.gemm = (pixels, 9 * width, int(cfg.MODEL.EXPANSION_FACTOR * width))

    def begin(self, index: int) -> None:
        cfg, rng = self.cfg, self.seed(index)
        self.step = cfg.TRAIN.PRETRAIN_STEPS + index
        shape = self.height, self.width
        images = torch.randn(self.units, 3, *shape, dtype=self.options.dtype)
        classes = cfg.DATASET.NUM_CLASSES if self.segments else cfg.MODEL.NUM_CLASSES
        label = torch.randint(classes, (self.units, *shape) if self.segments else (self.units,))
        self.images, self.label = images.to(self.device), label.to(self.device)
        self.jac_weight = image_schedules.jac_factor(cfg, self.step, 0)
        delta = rng.randint(-cfg.DEQ.RAND_F_THRES_DELTA, 1)
        frequency = self._frequency(cfg.LOSS.JAC_LOSS_FREQ)
        self.with_jac = rng.random() < frequency and self.jac_weight > 0
        if not self.with_jac or cfg.DEQ.RAND_F_THRES_DELTA == 0:
            delta = 0
        self.f_thres = max(1, cfg.DEQ.F_THRES + delta)

    def loss(self) -> Tensor:
        with autocast(self.form.amp, self.device):
            output, jac_loss, _ = self.model(
                self.images,
                train_step=self.step,
                compute_jac_loss=self.with_jac,
                f_thres=self.f_thres,
                b_thres=self.b_thres,
            )
        output = output.to(self.options.dtype)
        if self.segments:
            loss = mean_loss(*self.criterion(output, self.label))
        else:
            loss = F.cross_entropy(output, self.label)
        return loss + self.jac_weight * jac_loss.to(loss).mean() if self.with_jac else loss

    def update(self) -> None:
        cfg = self.cfg
        if cfg.TRAIN.CLIP > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.TRAIN.CLIP)
        rate = image_schedules.learning_rate(cfg, self.step, _STEPS_PER_EPOCH)
        set_rate(self.optimizer, rate)
        self.optimizer.step()


def unfused(kind: type[torch.optim.Optimizer], model: nn.Module, **options):
    """An optimiser with PyTorch's own choice of implementation."""
    return kind(model.parameters(), **options)


def set_rate(optimizer: torch.optim.Optimizer, published: float) -> None:
    """Give the optimiser the published rate times :data:`RATE`."""
    for group in optimizer.param_groups:
        group["lr"] = RATE * published


@torch.no_grad()
def damp(model: nn.Module, gain: float) -> None:
    """Give the affine group norms of blocks and fusion the weight ``gain``, at most 1."""
    for module in model.fullstage.modules():
        if isinstance(module, nn.GroupNorm) and module.weight is not None:
            module.weight.fill_(gain)
            module.bias.normal_(std=(1 - gain**2) ** 0.5)


def make_task(name: str, form: Form, options: Options) -> Task:
    """The training step of a setting in a form, ready for step 0."""
    return (LanguageTask if name in LANGUAGE else ImageTask)(name, form, options)
