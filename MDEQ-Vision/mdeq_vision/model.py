"""Multiscale deep equilibrium models (arXiv 2006.08656): classification and segmentation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from lib.deq import SRADIUS_ITERS, SolverAttributes, stacked
from lib.errors import InputError, check
from lib.jacobian import jac_loss_estimate
from lib.layer_utils import conv3x3, list2vec, vec2list
from lib.solvers.stats import scalars_to
from mdeq_vision.config import make_deq
from mdeq_vision.heads import classification_modules, segmentation_layer, to_highest_resolution
from mdeq_vision.layer import MultiscaleLayer, branch_sizes
from mdeq_vision.stage import check_integer, full_stage
from mdeq_vision.start import PREFIX, Start, WithLoss, distance

JAC_VECS = 2  # random vectors of the Jacobian loss, as in the published runs
_INIT_STD = 0.01
FOLLOW_THRES = 3  # threshold of the solver for images that follow others in a sequence
FOLLOW_CUT = 0.5  # relative residual of the start; above it an image shows another scene


def _stem(width: int, downsample_times: int, momentum: float) -> nn.Sequential:
    """At least two times conv3x3, BN, relu; the first ``downsample_times`` have stride 2."""
    stem = nn.Sequential()
    for n in range(max(2, downsample_times)):
        conv = conv3x3(width if n else 3, width, stride=2 if downsample_times > n else 1)
        norm, relu = nn.BatchNorm2d(width, momentum=momentum), nn.ReLU(inplace=True)
        # The published state dicts name the modules from the third step on like this.
        names = ("DS{}", "DS{}-BN", "DS{}-RELU") if n >= 2 else [None] * 3
        for name, module in zip(names, (conv, norm, relu), strict=True):
            stem.add_module(name.format(n + 1) if name else str(len(stem)), module)
    return stem


class MDEQNet(SolverAttributes, nn.Module):
    """Stem, fixed point of the multiscale layer f, and (in subclasses) a head.

    The stem gives the injection x = stage0(downsample(image)), which enters branch 0. A solver
    finds z* = f(z*; x) from z = 0, or from a learned guess (:mod:`mdeq_vision.start`). In the first
    TRAIN.PRETRAIN_STEPS training steps (the stacked phase), f is applied MODEL.NUM_LAYERS times
    to z = 0 instead, with ordinary autograd.

    Args:
        cfg: the configuration. Only MODEL, DEQ, TRAIN.PRETRAIN_STEPS and COMPILE are read; the
            global ``config`` is not.
        bn_momentum: momentum of every batch norm.

    Raises:
        InputError: settings are missing or do not fit together.
    """

    ignored_state = ("fullstage_copy.",)  # the published files hold fullstage twice

    def __init__(self, cfg: CfgNode, bn_momentum: float):
        super().__init__()
        model, stage = cfg.MODEL, full_stage(cfg)
        check_integer("MODEL.NUM_LAYERS", model.NUM_LAYERS, 1)
        check_integer("MODEL.DOWNSAMPLE_TIMES", model.DOWNSAMPLE_TIMES, 0)
        self.n_layer, self.pretrain_steps = model.NUM_LAYERS, cfg.TRAIN.PRETRAIN_STEPS
        self.f_thres, self.b_thres = cfg.DEQ.F_THRES, cfg.DEQ.B_THRES
        self.deq = make_deq(cfg)
        self.channels = list(stage.NUM_CHANNELS)
        self.downsample = _stem(self.channels[0], model.DOWNSAMPLE_TIMES, bn_momentum)
        self.stage0 = None
        if model.DOWNSAMPLE_TIMES > 0 or len(self.channels) > 2:
            self.stage0 = nn.Sequential(
                nn.Conv2d(self.channels[0], self.channels[0], 1, bias=False),
                nn.BatchNorm2d(self.channels[0], momentum=bn_momentum),
                nn.ReLU(inplace=True),
            )
        self.fullstage = MultiscaleLayer(cfg)
        self.start = Start(self.channels) if cfg.DEQ.F_START == "learned" else None
        if self.start is None:  # the weights of a run with a start serve without it, too
            self.ignored_state = (*self.ignored_state, PREFIX)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load as nn.Module does, but skip the entries that only the published files have."""
        if any(key.startswith(self.ignored_state) for key in state_dict):
            state_dict = {
                k: v for k, v in state_dict.items() if not k.startswith(self.ignored_state)
            }
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _initialize(self) -> None:
        """Draw weights and biases of convolutions from N(0, 0.01^2).

        Weight-normalised weights keep PyTorch's default, those of the start their own.
        """
        own_start = set() if self.start is None else set(self.start.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in own_start:
                own = module._parameters
                for name in ("weight", "bias"):
                    if own.get(name) is not None:
                        nn.init.normal_(own[name], std=_INIT_STD)

    def forward(
        self,
        x: Tensor,
        train_step: int = -1,
        compute_jac_loss: bool = True,
        spectral_radius_mode: bool = False,
        f_thres: int | None = None,
        b_thres: int | None = None,
        writer=None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the scores of a batch of images.

        Args:
            x: (B, 3, H, W) of any size. In training, batch norm needs more than one value per
                channel, also at the lowest resolution.
            train_step: 0 <= train_step < PRETRAIN_STEPS selects the stacked phase; any other
                value (-1 too) runs the solver.
            compute_jac_loss: estimate the Jacobian loss. This happens in training only; the
                stacked phase takes it at a detached copy of the last state.
            spectral_radius_mode: compute the spectral radius. This happens in evaluation at
                the fixed point only.
            f_thres, b_thres: thresholds of the forward and backward solver; None takes the
                configuration's.
            writer: a SummaryWriter; gets the residuals and nfe of both passes.

        Returns:
            The head's output, jac_loss (1, 1) and sradius (B, 1). jac_loss and sradius are zero
            when not computed.

        Raises:
            InputError: x has another shape, no element, or integers.
        """
        f, z0, guess = self._equation(x)
        jac_vecs = JAC_VECS if compute_jac_loss and self.training else 0

        if 0 <= train_step < self.pretrain_steps:
            z = stacked(f, z0, self.n_layer)
            jac_loss, sradius = z0[0].new_zeros(()), z0[0].new_zeros(len(x), 1)
            if jac_vecs and torch.is_grad_enabled():
                point = list2vec(z).detach().requires_grad_()
                f_point = list2vec(f(vec2list(point, [z_i.shape[1:] for z_i in z])))
                jac_loss = jac_loss_estimate(f_point, point, vecs=jac_vecs)
        else:
            solution = self.deq(
                f,
                [p.detach() for p in guess],
                f_thres=self.f_thres if f_thres is None else f_thres,
                b_thres=self.b_thres if b_thres is None else b_thres,
                training=self.training,
                jac_vecs=jac_vecs,
                sradius_iters=0 if self.training else SRADIUS_ITERS * spectral_radius_mode,
                on_solve=None if writer is None else scalars_to(writer, train_step),
            )
            z, jac_loss, sradius = solution.z, solution.jac_loss, solution.sradius
        output = self.head(z)
        if self.start is not None and self.training and torch.is_grad_enabled():
            output = WithLoss.apply(output, distance(guess, z))
        return output, jac_loss.view(1, 1), sradius

    @torch.no_grad()
    def follow(
        self, x: Tensor, state: list[Tensor] | None = None, f_thres: int = FOLLOW_THRES
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the scores of the next images of sequences; without gradients.

        The solve begins at the fixed point of the images before, which is near where little moved.
        The first image, and one that shows another scene, are solved to the model's own threshold
        and tolerance. Another scene is one where the relative residual of the start is above
        FOLLOW_CUT; at zeros it is 1.

        Args:
            x: (B, 3, H, W): one image of each of B sequences.
            state: what the call before returned; None begins at zeros. So does a state of images
                of another number or size.
            f_thres: threshold of the solver for images that follow others; at most the model's own.

        Returns:
            The head's output, and the state z* for the next call.

        Raises:
            InputError: as :meth:`forward`.
        """
        f, z0, guess = self._equation(x)
        follows = state is not None and [z.shape for z in state] == [z.shape for z in z0]
        start, thres = (state, min(f_thres, self.f_thres)) if follows else (guess, self.f_thres)
        solution = self.deq(f, start, f_thres=thres, training=False)
        first = solution.solution["rel_trace"][0]  # of the start
        if thres < self.f_thres and not first <= FOLLOW_CUT:
            solution = self.deq(f, solution.z_star, f_thres=self.f_thres, training=False)
        return self.head(solution.z), solution.z_star

    def _equation(self, x: Tensor) -> tuple[Callable, list[Tensor], list[Tensor]]:
        """f of the equation z = f(z; x), zeros in the shapes of z, and where its solver begins."""
        if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
            raise InputError(f"images have shape {tuple(x.shape)}, but must be (B, 3, H, W)")
        if not x.is_floating_point():
            raise InputError(
                f"images are {x.dtype}, but must be floats, normalised as in training: "
                "(images.float() / 255 - mean) / std"
            )
        injection = self.downsample(x)
        if self.stage0 is not None:
            injection = self.stage0(injection)
        injection = injection.to(x.dtype)  # the state takes this dtype, also under autocast
        sizes = branch_sizes(*injection.shape[-2:], len(self.channels))
        z0 = [
            injection.new_zeros(len(x), width, *size)
            for width, size in zip(self.channels, sizes, strict=True)
        ]
        guess = z0 if self.start is None else self.start(injection, z0)
        return self.fullstage.prepare(injection, z0), z0, guess

    def head(self, z: list[Tensor]) -> Tensor:
        """Compute the scores from the branches z_i."""
        raise NotImplementedError


class MDEQClsNet(MDEQNet):
    """Image classification: ``model(x)[0]`` is (B, MODEL.NUM_CLASSES)."""

    def __init__(self, cfg: CfgNode):
        momentum = 0.1
        super().__init__(cfg, momentum)
        stage = full_stage(cfg, head=True)
        check_integer("MODEL.NUM_CLASSES", cfg.MODEL.NUM_CLASSES, 1)
        self.incre_modules, self.downsamp_modules, self.final_layer = classification_modules(
            self.channels, stage.HEAD_CHANNELS, stage.FINAL_CHANSIZE, momentum
        )
        if cfg.MODEL.INIT_WEIGHTS:
            self._initialize()
        self.classifier = nn.Linear(stage.FINAL_CHANSIZE, cfg.MODEL.NUM_CLASSES)

    def head(self, z: list[Tensor]) -> Tensor:
        """Add the branches from high to low resolution; then global average and a linear layer."""
        y = self.incre_modules[0](z[0])
        for z_i, bottleneck, step in zip(
            z[1:], self.incre_modules[1:], self.downsamp_modules, strict=True
        ):
            y = bottleneck(z_i) + step(y)
        y = F.adaptive_avg_pool2d(self.final_layer(y), 1)  # (B, FINAL_CHANSIZE, 1, 1)
        return self.classifier(y.flatten(1))


class MDEQSegNet(MDEQNet):
    """Segmentation: ``model(x)[0]`` is (B, DATASET.NUM_CLASSES, H, W) at branch 0's resolution."""

    def __init__(self, cfg: CfgNode):
        momentum = 0.01
        super().__init__(cfg, momentum)
        kernel = cfg.MODEL.EXTRA.get("FINAL_CONV_KERNEL", 1)
        check_integer("DATASET.NUM_CLASSES", cfg.DATASET.NUM_CLASSES, 1)
        fits = type(kernel) is int and kernel in (1, 3)
        check(fits, "MODEL.EXTRA.FINAL_CONV_KERNEL", kernel, "1 or 3")
        self.last_layer = segmentation_layer(
            self.channels, cfg.DATASET.NUM_CLASSES, kernel, momentum
        )
        if cfg.MODEL.INIT_WEIGHTS:
            self._initialize()

    def head(self, z: list[Tensor]) -> Tensor:
        """Resize all branches to the highest resolution; then two convolutions."""
        return self.last_layer(to_highest_resolution(z))


def get_cls_net(cfg: CfgNode) -> MDEQClsNet:
    """Build the classification model of a configuration."""
    return MDEQClsNet(cfg)
