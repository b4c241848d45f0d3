"""The runs that can be planned: by a short name, a settings file, or the folder of a run."""

import argparse
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deq_sequence.command import read_corpus
from deq_sequence.options import build_parser, own_b_solver, parse
from deq_sequence.own_settings import read_settings
from deq_sequence.state.strings import is_state
from lib.errors import InputError, did_you_mean
from lib.runs.run_folder import SETTINGS
from lib.solvers import get_solver
from mdeq_vision.command import CONFIG
from mdeq_vision.config import config, update_config
from mdeq_vision.datasets import SEGMENTATION, get_cls_dataset, get_seg_dataset

ROOT = Path(__file__).parents[2]
WORDS, EXPERIMENTS = ROOT / "DEQ-Sequence", ROOT / "MDEQ-Vision/experiments"
# Symbols and training tokens of data sets that need not be there (DEQ-Sequence/get_data.sh), and
# training images.
TEXTS = {"wt103": (267_735, 103_227_021), "ptb": (10_000, 929_589)}
IMAGES = {"cifar10": 50_000, "imagenet": 1_281_167, "cityscapes": 2_975}
GRADIENTS = ("ift", "jfb", "phantom")  # that can be counted without values


@dataclass(frozen=True)
class Run:
    """A run, with the settings that its cost depends on; ``batch`` is that of all GPUs."""

    name: str
    settings: Any  # arguments of train_transformer.py, or a configuration of images
    published: str | None  # the published setting that it begins with, if it does
    changed: bool  # by flags or overrides

    @property
    def words(self) -> bool:
        return isinstance(self.settings, argparse.Namespace)

    @property
    def segments(self) -> bool:
        return not self.words and self.settings.DATASET.DATASET in SEGMENTATION

    @property
    def unit(self) -> str:
        return "token" if self.words else "image"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Symbols of the vocabulary and tokens of the text; classes and images."""
        if self.words:
            known = TEXTS.get(self.settings.dataset)
            if known:
                return known
            corpus = read_corpus(self.settings)
            return len(corpus.vocab), len(corpus.train)
        cfg = self.settings
        classes = cfg.DATASET.NUM_CLASSES if self.segments else cfg.MODEL.NUM_CLASSES
        if cfg.DATASET.DATASET in IMAGES:
            return classes, IMAGES[cfg.DATASET.DATASET]
        return classes, len((get_seg_dataset if self.segments else get_cls_dataset)(cfg, "train"))

    @property
    def batch(self) -> int:
        if self.words:
            return self.settings.batch_size
        train = self.settings.TRAIN
        return train.BATCH_SIZE or train.BATCH_SIZE_PER_GPU * len(self.settings.GPUS)

    @property
    def chunks(self) -> int:
        return self.settings.batch_chunk if self.words else self.settings.TRAIN.BATCH_CHUNK

    @property
    def units(self) -> int:
        """Tokens or images of one sample."""
        return self.settings.tgt_len if self.words else 1

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of a training image."""
        cfg = self.settings
        width, height = cfg.TRAIN.IMAGE_SIZE if self.segments else cfg.MODEL.IMAGE_SIZE
        return width, height

    @cached_property
    def steps(self) -> int:
        if self.words:
            return self.settings.max_step
        images, train = self.size[1], self.settings.TRAIN
        full = images // self.batch if self.segments else -(-images // self.batch)
        per_epoch = max(round(full * self.settings.PERCENT), 1)
        return per_epoch * (train.END_EPOCH - train.BEGIN_EPOCH)

    @property
    def stacked_steps(self) -> int:
        return min(self.border, self.steps)

    @property
    def border(self) -> int:
        return self.settings.pretrain_steps if self.words else self.settings.TRAIN.PRETRAIN_STEPS

    @property
    def grad(self) -> str:
        return self.settings.grad if self.words else self.settings.DEQ.GRAD

    @property
    def solvers(self) -> tuple[str, str]:
        if self.words:
            forward, backward = self.settings.f_solver, own_b_solver(self.settings)
        else:
            deq = self.settings.DEQ
            forward = deq.F_SOLVER
            backward = None if deq.B_SOLVER == "None" else deq.B_SOLVER
        return forward, backward or forward

    @property
    def drawn_thresholds(self) -> tuple[int, int]:
        """Lowest and highest forward threshold that a step at equilibrium draws."""
        if self.words:
            args = self.settings
            return max(args.f_thres - args.rand_f_thres_delta, 1), args.f_thres
        deq = self.settings.DEQ
        delta = deq.RAND_F_THRES_DELTA if self.jac_share else 0
        return max(deq.F_THRES - delta, 1), deq.F_THRES + (delta > 0)

    @property
    def thresholds(self) -> tuple[float, float]:
        """Mean forward and backward threshold of a step at equilibrium."""
        if self.words:
            args = self.settings
            return max(args.f_thres - args.rand_f_thres_delta / 2, 1), args.b_thres
        deq = self.settings.DEQ
        delta = deq.RAND_F_THRES_DELTA  # of steps with the Jacobian loss, from -delta to 1
        mean = (1 - delta) / 2 * self.jac_share if delta else 0.0
        return max(deq.F_THRES + mean, 1), deq.B_THRES

    @cached_property
    def jac_share(self) -> float:
        """Share of the steps at equilibrium that have the Jacobian loss."""
        if self.words:
            args = self.settings
            return args.jac_loss_freq if args.jac_loss_weight > 0 else 0.0
        loss, epochs = self.settings.LOSS, self.settings.TRAIN.END_EPOCH
        if loss.JAC_LOSS_WEIGHT <= 0 or not loss.JAC_LOSS_FREQ:
            return 0.0
        until = min(loss.JAC_STOP_EPOCH, epochs) * self.steps // max(epochs, 1)
        later = max(self.steps - self.stacked_steps, 1)
        return loss.JAC_LOSS_FREQ * max(until - self.stacked_steps, 0) / later

    @property
    def amp(self) -> str:
        return self.settings.amp if self.words else self.settings.AMP

    @property
    def tf32(self) -> bool:
        return self.settings.tf32 if self.words else self.settings.TF32


def known_runs() -> dict[str, Path]:
    """The short names, and the file of each."""
    found = {
        path.stem.replace("wt103_deq_transformer", "wt103"): path
        for path in sorted(WORDS.glob("wt103_*.sh"))
    }
    for path in sorted(EXPERIMENTS.glob("*/*.yaml")):
        kind, size = path.stem.split("_mdeq_")
        both = len(list(path.parent.glob(f"*_mdeq_{size}.yaml"))) > 1
        found[f"{path.parent.name}_{kind}_{size}" if both else f"{path.parent.name}_{size}"] = path
    return found


def find_run(name: str, more: list[str]) -> Run:
    """The run of this name, file or folder, with ``more`` flags or overrides as its trainer takes.

    Raises:
        InputError: there is none, or its settings cannot be used.
    """
    known, path = known_runs(), Path(name)
    if name in known:
        path = known[name]
    elif name and path.is_dir():
        files = [path / SETTINGS, path / CONFIG]
        path = next((file for file in files if file.is_file()), path)
        if path.is_dir():
            raise InputError(f"--run: {name} holds neither {SETTINGS} nor {CONFIG} of a run")
    if not path.is_file():
        hint = did_you_mean(name, known, otherwise=f": choose from {', '.join(known)}")
        raise InputError(f"--run: there is no run or file {name!r}{hint}")
    if path.suffix == ".yaml":
        cfg = config.clone()
        update_config(cfg, argparse.Namespace(cfg=path, opts=more))
        run = Run(name, cfg, _setting(path), bool(more))
    else:
        run = Run(name, _arguments(path, more), _setting(path), bool(more))
        if is_state(run.settings.dataset):
            raise InputError(f"--run: {name} trains on strings of a group: plan a run on text")
    if run.grad.partition(":")[0] not in GRADIENTS:
        raise InputError(
            f"the gradient {run.grad} cannot be planned: choose from {', '.join(GRADIENTS)}"
        )
    return run


def _setting(path: Path) -> str | None:
    """The name of a published setting, as the benchmarks write it."""
    path = path.resolve()
    if path.is_relative_to(EXPERIMENTS):
        return str(path.relative_to(EXPERIMENTS).with_suffix(""))
    return path.stem if path.parent == WORDS and path.suffix == ".sh" else None


def _arguments(path: Path, more: list[str]) -> argparse.Namespace:
    """The arguments of train_transformer.py in a launch script or in the settings of a run."""
    if path.suffix == ".json":
        return build_parser().parse_args(more, read_settings(path))
    found = re.search(r"settings=\((.*?)\)", path.read_text(encoding="utf-8"), re.DOTALL)
    if not found or not found[1].strip():
        raise InputError(f"--run: {path} has no list settings=(...) of flags")
    flags = shlex.split(found[1], comments=True)
    return parse([*(flag for flag in flags if flag != "--cuda"), *more])


def most_evaluations(solver: str, threshold: float) -> float:
    """Evaluations of f of a solve that runs to its threshold: one more with some solvers."""
    found = toy_solve(solver, 12)
    return threshold + max(found["nfe"] + found["products"] - 12, 0)


def toy_solve(solver: str, threshold: int, size: int = 64) -> dict:
    """A solve that runs to its threshold, of a map that is one operation."""
    x0 = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    solve = get_solver(solver, adjoint=solver.partition(":")[0] in ("gmres", "bicgstab"))
    return solve(lambda z: z.roll(1, 1), x0, threshold=threshold, eps=0.0)
