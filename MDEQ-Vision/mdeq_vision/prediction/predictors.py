"""Trained models as objects that take pictures, of any size and form."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from lib.auditing import Request, probing
from lib.errors import InputError, check_count
from lib.runs.evaluation_loop import evaluating
from lib.solvers.precision import autocast
from mdeq_vision.datasets import INPUTS, SegmentationFacts
from mdeq_vision.datasets.image_reading import as_seen, read_picture
from mdeq_vision.inference import predict_classes
from mdeq_vision.model import FOLLOW_THRES, MDEQNet
from mdeq_vision.prediction.overlays import with_legend

Picture = str | Path | Image.Image | Tensor
ELSEWHERE = 0.01  # relative distance; two ends of solves that are further apart are two equilibria
# How a frame is solved to find out: towards a hundredth of the tolerance, so that two solves of one
# equilibrium end much nearer to each other than ELSEWHERE. A solve has settled below the tolerance.
_TO_THE_END = Request(times=4, least=200, eps=0.01)


@dataclass(frozen=True)
class Classification:
    """What a classifier says of a picture.

    Attributes:
        classes: the names of the classes.
        probabilities: (n,), float32, one per output of the model.
        evaluations: how many evaluations of f the solver took for this picture.
        residual: the relative residual at its result.
    """

    classes: Sequence[str]
    probabilities: Tensor
    evaluations: int
    residual: float

    def best(self, number: int = 5) -> list[tuple[str, float]]:
        """The most probable classes, best first, with their probabilities.

        An output of the model beyond the classes is named by its number.
        """
        found = self.probabilities.topk(min(number, len(self.probabilities)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        known = len(self.classes)
        return [(self.classes[i] if i < known else f"output {i}", p) for i, p in pairs]


@dataclass(frozen=True)
class Segmentation:
    """What a segmentation model says of a picture.

    Attributes:
        picture: the upright picture, uint8 (H, W, 3).
        labels: the class of each pixel, by its place among the classes, uint8 (H, W).
        confidence: the probability of that class, float32 (H, W).
        evaluations: how many evaluations of f the solves took together.
        residual: the largest relative residual of a solve.
        solves: 1; or one for each window, scale and mirror image.
        facts: the names, colours and official labels of the classes.
        apart: None, or for a checked frame of a film: the relative distance between the film's
            equilibrium and that of a solve from the usual start (the largest of all solves; NaN if
            a solve did not settle).
    """

    picture: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    evaluations: int
    residual: float
    solves: int
    facts: SegmentationFacts
    apart: float | None = None

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, the largest first; no class without any."""
        numbers, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        names = self.facts.class_names
        return {names[numbers[i]]: float(counts[i] / self.labels.size) for i in order}

    def overlay(self) -> Image.Image:
        """The picture, beside it the picture in the colours of its classes, and their legend."""
        legend = {name: f"{name}  {100 * share:.1f} %" for name, share in self.shares.items()}
        names, palette = self.facts.class_names, self.facts.palette
        entries = [(text, palette[names.index(name)]) for name, text in legend.items()]
        return with_legend(self.picture, self.labels, palette, entries)


@dataclass(frozen=True)
class _Trained:
    """A trained model, ready for use.

    Attributes:
        model: the network, in evaluation mode.
        classes: the names of its classes, in the order of its outputs.
        settings: the configuration of its run.
        figures: by kind of record, the last figures of its run, such as ``final_test``.
    """

    model: MDEQNet
    classes: Sequence[str]
    settings: CfgNode
    figures: dict[str, dict]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _forward(self, images: Tensor) -> Tensor:
        with autocast(self.settings.AMP, self.device):
            return self.model(images.to(self.device), compute_jac_loss=False)[0].float()


class TrainedClassifier(_Trained):
    """A trained classifier. Attributes: ``model``, ``classes``, ``settings``, ``figures``."""

    def classify(
        self, images: Picture | Sequence[Picture]
    ) -> Classification | list[Classification]:
        """Class probabilities of one picture, or a list of them for several.

        A picture is a path, a PIL image, or a tensor of pixels as :func:`to_picture` takes it. It
        is resized and cropped as test images of the run's data set are; of those that know one
        size alone (digits, CIFAR-10), the centre square takes that size first. Each picture is
        solved by itself.

        Raises:
            InputError: a picture cannot be read.
        """
        found = [self._classify(picture) for picture in _several(images)]
        return found if _are_several(images) else found[0]

    def _classify(self, picture: Picture) -> Classification:
        cfg = self.settings
        x = INPUTS[cfg.DATASET.DATASET](to_picture(picture), cfg)
        with evaluating(self.model) as stats:
            probabilities = self._forward(x[None])[0].softmax(dim=0).cpu()
        last = stats.forward.last
        return Classification(self.classes, probabilities, last["nfe"], last["rel_residual"])


@dataclass(frozen=True)
class TrainedSegmenter(_Trained):
    """A trained segmentation model; ``facts`` has the names and colours of its classes."""

    facts: SegmentationFacts

    def segment(self, images: Picture | Sequence[Picture]) -> Segmentation | list[Segmentation]:
        """The class of each pixel of one picture, or a list of such results for several.

        Pictures are as for :meth:`TrainedClassifier.classify`. They are treated as seg_test treats
        whole test images: TEST.BASE_SIZE is their long side, windows of TEST.IMAGE_SIZE cover
        larger ones, and TEST.MULTI_SCALE and FLIP_TEST are followed. CENTER_CROP_TEST is not.

        Raises:
            InputError: a picture cannot be read.
        """
        found = [self._segment(picture, self._forward) for picture in _several(images)]
        return found if _are_several(images) else found[0]

    def film(
        self, f_thres: int = FOLLOW_THRES, check: int = 0
    ) -> Callable[[Picture], Segmentation]:
        """A function that segments the frames of a film, one call a frame.

        Each solve begins at the equilibrium of the frame before and takes few evaluations of f,
        because little moves from frame to frame. The first frame, and one that shows another
        scene, are solved to the end: see :meth:`mdeq_vision.model.MDEQNet.follow`. A frame is a
        picture as for :meth:`segment`::

            film = model.film()
            found = [film(frame) for frame in frames]

        Args:
            f_thres: threshold of the solver for a frame that follows another; at most the model's
                own.
            check: find out for every ``check``-th frame whether f has several equilibria, and the
                film follows another one than a solve from the usual start finds: ``apart`` of the
                result. Both solves go on towards a hundredth of the tolerance, which takes longer
                than the frame and changes nothing else. 0: for no frame.

        Raises:
            InputError: f_thres is no positive integer, or check is negative; in a call, the frame
                cannot be read.
        """
        check_count("f_thres", f_thres)
        check_count("check", check, 0)
        # One state for each window, scale and mirror image of a frame, in their order.
        states: list[list[Tensor] | None] = []
        frames = count()

        def next_frame(picture: Picture) -> Segmentation:
            calls, frame = count(), next(frames)
            checked = bool(check and frame and frame % check == 0)
            apart: list[float] = []

            def forward(images: Tensor) -> Tensor:
                number = next(calls)
                if number == len(states):
                    states.append(None)
                images = images.to(self.device)
                with autocast(self.settings.AMP, self.device):
                    scores, states[number] = self.model.follow(images, states[number], f_thres)
                if checked:
                    apart.append(self._apart(images, states[number]))
                return scores.float()

            found = self._segment(picture, forward)
            return replace(found, apart=float(np.max(apart))) if checked else found

        return next_frame

    def _apart(self, images: Tensor, state: list[Tensor]) -> float:
        """How far the equilibrium to which ``state`` leads is from that of a solve without it.

        The distance is relative to the second one's norm; NaN if a solve does not settle.
        """
        with probing(self.model, None) as probe:
            probe.request = _TO_THE_END
            for start in (state, None):
                self.model.follow(images, start, self.model.f_thres)
        film, own = probe.found
        if not (film.settled.all() and own.settled.all()):
            return float("nan")
        return ((film.z - own.z).norm() / own.z.norm()).item()

    def _segment(self, picture: Picture, forward: Callable[[Tensor], Tensor]) -> Segmentation:
        test, facts = self.settings.TEST, self.facts
        pixels = np.array(to_picture(picture))
        x = torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (facts.mean, facts.std))
        x.div_(255).sub_(mean).div_(std)  # in place: a picture may be large
        residuals = []
        with evaluating(self.model) as stats:

            def logits(images: Tensor) -> Tensor:
                output = forward(images)
                residuals.append(stats.forward.last["rel_residual"])
                return output

            labels, confidence = predict_classes(
                logits,
                x[None],
                window=tuple(test.IMAGE_SIZE),
                base_size=test.BASE_SIZE,
                scales=test.SCALE_LIST if test.MULTI_SCALE else [1.0],
                flip=test.FLIP_TEST,
            )
        return Segmentation(
            picture=pixels,
            labels=labels[0].to(torch.uint8).cpu().numpy(),
            confidence=confidence[0].cpu().numpy(),
            evaluations=stats.forward.nfe,
            residual=max(residuals),
            solves=len(residuals),
            facts=facts,
        )


def to_picture(picture: Picture, name: str = "given") -> Image.Image:
    """The upright RGB image of a path, a PIL image or a tensor.

    A tensor has pixels: (H, W), (1, H, W) or (3, H, W), uint8, or floats from 0 to 1, which are
    rounded to 8 bits. Batches that a data set has normalised go to ``.model`` itself.

    Raises:
        InputError: a file cannot be read, or a tensor has another form.
    """
    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    if isinstance(picture, Image.Image):
        return as_seen(picture, name)
    if not isinstance(picture, Tensor):
        raise InputError(
            f"a picture is a path, a PIL image or a tensor, but this is a {type(picture).__name__}"
        )
    x = picture.detach().cpu()
    x = x[None] if x.ndim == 2 else x
    fits = x.ndim == 3 and x.shape[0] in (1, 3) and x.numel() > 0
    if fits and x.is_floating_point() and bool(((x >= 0) & (x <= 1)).all()):
        x = (x.float() * 255).round().to(torch.uint8)
    if not fits or x.dtype != torch.uint8:
        raise InputError(
            f"a tensor of pixels is uint8, or floats from 0 to 1, of shape (3, H, W) or (H, W), "
            f"but this is {picture.dtype} of shape {tuple(picture.shape)}"
        )
    return Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _are_several(images) -> bool:
    return isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4)


def _several(images) -> Iterable[Picture]:
    return images if _are_several(images) else [images]
