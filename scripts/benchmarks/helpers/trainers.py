"""Trainers for the benchmarks: those of the quickstart, and the published settings scaled down.

Unlike the single steps of tasks.py these are what a run uses, in any number of
processes. The quickstart's (words, digits, scenes) train on its own data, in the size of the
quickstart, or tiny for tests. Published settings take random tokens or images and the weights of
tasks.py, whose solvers have as much to do as those of a trained model.
"""

from argparse import Namespace
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.data import Dataset
from yacs.config import CfgNode

from deq_sequence.command import build_model
from deq_sequence.options import parse
from deq_sequence.quickstart import SETTINGS as QUICKSTART
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from helpers.settings import FORMS, ROOT, Options, chosen_settings
from helpers.tasks import RATE, LanguageTask, make_task
from helpers.work import most_evaluations
from lib.errors import InputError
from lib.runs.processes import Processes
from lib.runs.trainer import Trainer
from mdeq_vision.config import config, update_config
from mdeq_vision.datasets import CITYSCAPES, get_cls_dataset, get_seg_dataset
from mdeq_vision.image_trainer import ImageTrainer
from mdeq_vision.model import MDEQSegNet, get_cls_net
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer

EMBEDDED = ("words", "digits", "scenes")
IMAGE_FILES = {"digits": "digits/cls_mdeq_TINY", "scenes": "digit_scenes/seg_mdeq_TINY"}
_CPU = torch.device("cpu")
_IMPLICIT = "--grad ift --f_thres 12 --b_thres 12"  # solves in both passes, as published
_MEASURED = "--optim Adam --wnorm --d_inner 512"  # with which the pages' figures were measured
_TINY_WORDS = """
    --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --n_layer 2 --eval_n_layer 2 --init_std 0.2
    --tgt_len 8 --mem_len 8 --eval_tgt_len 8 --batch_size 4 --eval_batch_size 4 --max_eval_steps 2
    --f_thres 6 --b_thres 6
"""
_STAGE = "MODEL.EXTRA.FULL_STAGE"
_TINY_IMAGES = f"""
    MODEL.NUM_LAYERS 2 DEQ.F_THRES 4 DEQ.B_THRES 4 TRAIN.BATCH_SIZE_PER_GPU 4 TEST.NUM_SAMPLES 8
    {_STAGE}.NUM_BRANCHES 2 {_STAGE}.NUM_CHANNELS [8,8] {_STAGE}.NUM_BLOCKS [1,1]
    {_STAGE}.BIG_KERNELS [0,0] {_STAGE}.HEAD_CHANNELS [4,4] MODEL.IMAGE_SIZE [8,8]
    TRAIN.IMAGE_SIZE [32,32]
"""


def chosen_trainers(text: str) -> list[str]:
    """Names from a comma-separated list: words, digits, scenes, quickstart for all three, or
    published settings.

    Raises:
        InputError: an unknown name.
    """
    names = []
    for word in text.split(","):
        if word in EMBEDDED or word == "quickstart":
            names += EMBEDDED if word == "quickstart" else [word]
            continue
        try:
            names += chosen_settings(word)
        except InputError as error:
            raise InputError(f"{error} (or of {', '.join(EMBEDDED)}, quickstart)") from error
    return list(dict.fromkeys(names))


def words_arguments(flags: str | list[str] = "", *, tiny: bool = False) -> Namespace:
    """Arguments of train_transformer.py: the quickstart's by Adam, implicit, and then ``flags``."""
    flags = flags.split() if isinstance(flags, str) else flags
    data = ["--data", str(ROOT / "DEQ-Sequence/data/demo")]
    settings = f"{QUICKSTART} {_MEASURED} {_IMPLICIT}".split()
    return parse([*settings, *data, *(_TINY_WORDS.split() if tiny else []), *flags])


def image_configuration(name: str, *overrides: object, tiny: bool = False) -> CfgNode:
    """Configuration of digits or scenes: the quickstart's, and then ``overrides``."""
    cfg = config.clone()
    opts = [*(_TINY_IMAGES.split() if tiny else []), *map(str, overrides)]
    update_config(cfg, Namespace(cfg=image_file(name), opts=opts))
    return cfg


def image_file(name: str):
    """The yaml file of digits or scenes."""
    return ROOT / "MDEQ-Vision/experiments" / f"{IMAGE_FILES[name]}.yaml"


def make_trainer(
    name: str,
    processes: Processes,
    options: Options,
    *,
    batch: int | None,
    times: int,
    stacked: int,
) -> Trainer:
    """A trainer on the CPU whose next ``stacked`` steps are stacked, and all after them solved.

    All ``processes`` together take ``times`` as many samples as ``batch``, or as the setting's own.
    """
    tiny = options.size.widths is not None
    torch.manual_seed(options.seed)  # the same weights in all processes
    if name == "words":
        trainer = _words(processes, batch, times, stacked, tiny)
    elif name in IMAGE_FILES:
        opts = ["TRAIN.PRETRAIN_STEPS", stacked, "TRAIN.END_EPOCH", 10**6, "SEED", options.seed]
        cfg = image_configuration(name, *opts, tiny=tiny)
        own = batch or cfg.TRAIN.BATCH_SIZE_PER_GPU
        make = get_cls_net if name == "digits" else MDEQSegNet
        data = _image_data(name, tiny)
        trainer = _images(cfg, own * times, make(cfg), data, name == "scenes", processes)
    else:
        trainer = _published(name, processes, options, batch, times, stacked)
    processes.vary_seed(options.seed)
    trainer.model.train()
    return trainer


def _words(processes, batch, times, stacked, tiny) -> LMTrainer:
    args = words_arguments(f"--pretrain_steps {stacked} --max_step {10**6}", tiny=tiny)
    args.batch_size = (batch or args.batch_size) * times
    corpus = random_text(60, 4000) if tiny else processes.in_turn(_demo)
    return LMTrainer(args, build_model(args, corpus, _CPU), corpus, _CPU, processes)


@cache
def _demo():
    return get_lm_corpus(words_arguments().data, "demo")


def random_text(vocab: int, length: int) -> SimpleNamespace:
    """What a trainer needs of a corpus: random words, frequent ones first as in a text (Zipf)."""
    frequencies = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    text = torch.multinomial(frequencies, length, replacement=True)
    splits = dict.fromkeys(("train", "valid", "test"), text)
    facts = {"vocab": range(vocab), "characters": False, "fingerprint": lambda: "random"}
    return SimpleNamespace(**splits, **facts)


@cache
def _image_data(name: str, tiny: bool) -> Dataset:
    get = get_cls_dataset if name == "digits" else get_seg_dataset
    return get(image_configuration(name, tiny=tiny), "train")


def _images(cfg, batch: int, model, data, segments: bool, processes: Processes) -> ImageTrainer:
    cfg.defrost()
    cfg.TRAIN.BATCH_SIZE, cfg.WORKERS = batch, 0
    cfg.freeze()
    kind = SegmentationTrainer if segments else ClassificationTrainer
    return kind(cfg, model, data, data, _CPU, [], processes)


def _published(name, processes, options, batch, times, stacked) -> Trainer:
    task = make_task(name, FORMS["fast"], options)
    if isinstance(task, LanguageTask):
        args = task.args
        args.batch_size, args.lr = (batch or args.batch_size) * times, args.lr * RATE
        args.multi_gpu, args.gpu0_bsz = False, -1
        corpus = random_text(options.vocab, 8 * args.batch_size * args.tgt_len)
        trainer = LMTrainer(args, task.model, corpus, _CPU, processes)
        trainer.step = args.pretrain_steps - stacked
        return trainer
    cfg = task.cfg.clone()
    cfg.defrost()
    cfg.TRAIN.LR, cfg.TRAIN.END_EPOCH = cfg.TRAIN.LR * RATE, 10**6
    own = (batch or cfg.TRAIN.BATCH_SIZE_PER_GPU) * times
    data = _Noise(64 * own, (task.height, task.width), cfg, task.segments)
    trainer = _images(cfg, own, task.model, data, task.segments, processes)
    trainer.step = cfg.TRAIN.PRETRAIN_STEPS - stacked
    return trainer


class _Noise(Dataset):
    """Random images with random labels, of a class each or of a class per pixel."""

    def __init__(self, n: int, shape: tuple[int, int], cfg: CfgNode, segments: bool):
        self.n, self.shape, self.segments, self.facts = n, shape, segments, CITYSCAPES
        self.n_classes = cfg.DATASET.NUM_CLASSES if segments else cfg.MODEL.NUM_CLASSES

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(self.n_classes, self.shape if self.segments else ())
        return torch.randn(3, *self.shape), label


def batch_size(trainer: Trainer) -> int:
    """Samples per step, of all processes together."""
    return trainer.batch_size if isinstance(trainer, ImageTrainer) else trainer.args.batch_size


def most_evaluations_of(trainer: Trainer) -> list[float]:
    """Evaluations of a forward and of a backward solve that run to their thresholds."""
    if isinstance(trainer, ImageTrainer):
        deq = trainer.cfg.DEQ
        solvers = (deq.F_SOLVER, deq.F_THRES), (deq.B_SOLVER, deq.B_THRES)
    else:
        args = trainer.args
        solvers = (args.f_solver, args.f_thres), (args.b_solver, args.b_thres)
    return [most_evaluations(*solver) for solver in solvers]


def next_step(trainer: Trainer, batches) -> None:
    """One training step, its batch loaded; no log, no validation, no checkpoint."""
    trainer.update(next(batches))
    if isinstance(trainer, ImageTrainer) and trainer.position == trainer.n_batches:
        trainer.next_epoch()
