"""What is trained in one process and in several: real data, real trainers, exact enough to tell.

Models are in float64 and the solves so tight that it does not matter whose samples share one:
what remains between one process and several is the order of additions.
"""

import contextlib
import math
from dataclasses import dataclass, field
from functools import cache, partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import lib.deq
import mdeq_vision.model
from deq_sequence.command import build_model
from deq_sequence.options import parse
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from lib.runs.processes import Processes
from lib.runs.run_folder import Run
from lib.runs.trainer import Trainer
from lib.solvers import broyden
from mdeq_vision.config import config, merge_file
from mdeq_vision.datasets import digit_scenes, get_cls_dataset, get_seg_dataset
from mdeq_vision.model import MDEQClsNet, MDEQSegNet
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer
from small_runs import DIGITS, SCENES
from small_vision import fill

TIGHT = partial(broyden, eps=1e-11)
THRESHOLD = 300
CPU = torch.device("cpu")
BATCH, VALID = 8, 6  # samples of a step over all processes; images to validate on

# Clipping would hide a gradient of the wrong length, as Adam does in the losses. With these weights
# a tight solve takes thirty evaluations; with smaller ones, or layer norm first, two hundred.
WORDS = f"""
    --dataset demo --d_model 32 --n_head 2 --d_head 16 --d_inner 64 --wnorm
    --init_std 0.4 --n_layer 3 --eval_n_layer 3 --tgt_len 16 --mem_len 16 --eval_tgt_len 32
    --eval_batch_size 4 --max_eval_steps 2 --f_thres {THRESHOLD} --b_thres {THRESHOLD}
    --lr 0.002 --warmup_step 5 --log-interval 1 --eval-interval 100000 --jac_loss_weight 0.3
    --clip 0
"""
# The models of the quickstart with narrower branches, the scenes at half their size. Their weights
# are set such that f has an equilibrium, and the rate such that it keeps it: an untrained MDEQ has
# none to speak of, and what a solver ends with then depends on its batch.
STAGE = "MODEL.EXTRA.FULL_STAGE"
IMAGES = f"""
    DEQ.F_THRES {THRESHOLD} DEQ.B_THRES {THRESHOLD} DEQ.RAND_F_THRES_DELTA 0 PRINT_FREQ 1
    SAVE_FREQ 0 WORKERS 0 TEST.BATCH_SIZE_PER_GPU 8 TRAIN.LR 0.0005
""".split()
SMALL = {
    "digits": f"{STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4] MODEL.IMAGE_SIZE [8,8] "
    "MODEL.POST_GN_AFFINE True",
    "scenes": f"{STAGE}.NUM_CHANNELS [8,8,8] TRAIN.IMAGE_SIZE [32,32] TEST.IMAGE_SIZE [32,32] "
    "TRAIN.BASE_SIZE 32 TEST.BASE_SIZE 32",
}
TASKS = {
    "digits": (DIGITS, get_cls_dataset, MDEQClsNet, ClassificationTrainer),
    "scenes": (SCENES, get_seg_dataset, MDEQSegNet, SegmentationTrainer),
}


@dataclass(frozen=True)
class Case:
    """A run: the ``model`` (words, digits, scenes), and how it differs from the plain one.

    ``steps`` are taken in all, half of them stacked. With ``grouped``, images that batch norm
    sees together in one process are those that so many processes give it together.
    """

    model: str
    name: str = "plain"
    batch: int = BATCH
    chunk: int = 1
    jacobian: bool = False
    frozen: bool = False  # batch norm by its running statistics
    grouped: int = 1
    steps: int = 50
    more: tuple[str, ...] = ()


class Recorder(Run):
    """Keeps the records of a run instead of writing them."""

    def __init__(self):
        super().__init__(None, ("", ""), quiet=True)
        self.records: list[tuple[str, int, dict]] = []
        self.lines: list[str] = []

    def record(self, kind: str, step: int, **values) -> None:
        self.records.append((kind, step, values))

    def log(self, line: str) -> None:
        self.lines.append(line)

    def losses(self, kind: str = "train") -> list[float]:
        return [values["loss"] for found, _, values in self.records if found == kind]


@dataclass
class Found:
    """What a run has computed: a loss per step, the clipped gradients of the first step, the
    validation loss of either phase, the final weights, the worst residual of a solve, the
    smallest Jacobian loss (inf without one)."""

    losses: list[float]
    valid: list[float]
    state: dict[str, Tensor]
    residual: float
    jac_loss: float
    grads: dict[str, Tensor] = field(default_factory=dict)


# ---- trainers ----------------------------------------------------------------------------------


class InDouble(Dataset):
    """The first ``n`` items of a data set, their images in float64."""

    def __init__(self, dataset: Dataset, n: int):
        self.dataset, self.n = dataset, min(n, len(dataset))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        image, label = self.dataset[index]
        return image.double(), label

    def __getattr__(self, name: str):
        return getattr(self.dataset, name)


@cache
def corpus(folder: str):
    return get_lm_corpus(folder, "demo")


def words_trainer(case: Case, processes: Processes, data: str) -> LMTrainer:
    argv = [*WORDS.split(), "--data", data, "--batch_size", case.batch, "--batch_chunk", case.chunk]
    argv += ["--max_step", case.steps, "--pretrain_steps", case.steps // 2]
    argv += ["--jac_loss_freq", int(case.jacobian), *case.more]
    args = parse([str(a) for a in argv])
    torch.manual_seed(args.seed)
    model = build_model(args, corpus(data), CPU).double()
    model.f_solver = model.b_solver = TIGHT
    processes.vary_seed(args.seed)
    return LMTrainer(args, model, corpus(data), CPU, processes)


def image_config(case: Case):
    """Two epochs, the second at equilibrium."""
    cfg = config.clone()
    cfg.defrost()
    merge_file(cfg, TASKS[case.model][0])
    cfg.merge_from_list([*IMAGES, *SMALL[case.model].split()])
    cfg.merge_from_list(["TRAIN.END_EPOCH", 2, "TRAIN.PRETRAIN_STEPS", case.steps // 2])
    cfg.merge_from_list(["TRAIN.BATCH_SIZE", case.batch, "TRAIN.BATCH_CHUNK", case.chunk])
    cfg.merge_from_list(["LOSS.JAC_LOSS_FREQ", float(case.jacobian), *case.more])
    return cfg


@cache
def image_sets(model: str, n: int):
    """Training and validation images of the embedded data, at the size of ``SMALL``."""
    cfg, get = image_config(Case(model)), TASKS[model][1]
    with mock.patch.dict(digit_scenes.N_SCENES, train=n, valid=VALID):
        train, valid = (get(cfg, split) for split in ("train", "valid"))
    return InDouble(train, n), InDouble(valid, VALID)


def image_trainer(case: Case, processes: Processes) -> Trainer:
    _, _, net, task = TASKS[case.model]
    cfg, n = image_config(case), case.batch * (case.steps // 2)
    if case.model == "digits" and case.chunk == 1:
        n -= 5  # leaves 3 of 8 images in the last batch, which cannot be shared evenly, or 1 of 6
    torch.manual_seed(cfg.SEED)
    model = net(cfg).double()
    fill(model, seed=3)
    model.f_solver = model.b_solver = TIGHT
    processes.vary_seed(cfg.SEED)
    trainer = task(cfg, model, *image_sets(case.model, n), CPU, [], processes)
    if case.frozen:
        freeze_batch_norm(trainer.model)
    batches = trainer.batches
    if case.grouped > 1:
        trainer.batches = lambda: (
            [grouped(part, case.grouped, case.chunk) for part in batch] for batch in batches()
        )
    return trainer


def grouped(batch: Tensor, world_size: int, chunks: int) -> Tensor:
    """A batch in the order in which one process forms the parts of ``world_size`` processes.

    Each of them splits its own contiguous share; part k of all together is contiguous here.
    """
    shares = [batch[Processes(rank, world_size).part(len(batch))] for rank in range(world_size)]
    parts = zip(*(share.tensor_split(chunks) for share in shares), strict=True)
    return torch.cat([part for group in parts for part in group])


def freeze_batch_norm(model: nn.Module) -> None:
    """Batch norm by its running statistics, for good."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def make_trainer(case: Case, processes: Processes, data: str) -> Trainer:
    """The trainer of a case; ``data`` is the folder of the embedded text."""
    if case.model == "words":
        return words_trainer(case, processes, data)
    return image_trainer(case, processes)


# ---- runs --------------------------------------------------------------------------------------


def same_jac_loss(f0: Tensor, z0: Tensor, vecs: int = 2, create_graph: bool = True) -> Tensor:
    """The estimate with one vector for all samples: the real one draws in each process.

    Not a vector of ones: the sum over the output of a layer norm does not depend on z.
    """
    vector = torch.linspace(-1, 1.5, f0[0].numel(), dtype=f0.dtype, device=f0.device)
    loss = (f0 * vector.view(f0[0].shape)).sum()
    (product,) = torch.autograd.grad(loss, z0, create_graph=create_graph, retain_graph=True)
    return product.square().sum() / z0.numel()


@contextlib.contextmanager
def the_same_vectors():
    with (
        mock.patch.object(lib.deq, "jac_loss_estimate", same_jac_loss),
        mock.patch.object(mdeq_vision.model, "jac_loss_estimate", same_jac_loss),
    ):
        yield


def train(trainer: Trainer) -> Found:
    """Train to the end."""
    run, grads = Recorder(), {}

    def note(*_) -> None:
        if not grads:
            grads.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters())

    handle = trainer.optimizer.register_step_pre_hook(note)
    with the_same_vectors():
        trainer.train(run)
    handle.remove()
    names = (
        "forward_rel_residual",
        "backward_rel_residual",
        "rel_residual",
    )  # the last: validation
    residuals = [values.get(name, 0.0) for _, _, values in run.records for name in names]
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    jac_loss = min(values.get("jac_loss", math.inf) for _, _, values in run.records)
    return Found(run.losses(), run.losses("valid"), state, max(residuals), jac_loss, grads)


def largest(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two series of losses; inf where one is not finite."""
    pairs = list(zip(a, b, strict=True))
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in pairs):
        return math.inf
    return max((abs(x - y) / abs(y) for x, y in pairs), default=0.0)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of an entry, to the largest entry of ``b``."""
    assert a.keys() == b.keys()
    floating = [name for name, value in b.items() if value.is_floating_point()]
    scale = max(b[name].abs().max().item() for name in floating)
    return max((a[name] - b[name]).abs().max().item() for name in floating) / scale
