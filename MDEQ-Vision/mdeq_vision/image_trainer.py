"""The trainer of image models; a step is one batch of images."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from yacs.config import CfgNode

from lib.data_parallel import BalancedDataParallel
from lib.errors import InputError
from lib.runs.checkpoint import check_form
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.task import Care, Choices, Summands
from lib.runs.trainer import Trainer
from lib.solvers.precision import autocast
from mdeq_vision.curriculum import Curriculum
from mdeq_vision.datasets import fingerprint, make_loader, on_device
from mdeq_vision.evaluation import LESS_MEMORY, Evaluation
from mdeq_vision.events import ImageEvents
from mdeq_vision.losses import mean_loss
from mdeq_vision.model import MDEQNet
from mdeq_vision.schedules import jac_factor, learning_rate, make_optimizer
from mdeq_vision.sync_batchnorm import convert_sync_batchnorm, each_by_itself

RESUME = "TRAIN.RESUME True"
_MOMENTUM = "rmsprop's momentum"  # a key in ``fixed``


@dataclass(frozen=True)
class BatchPart:
    """Images and labels of one forward, and the size of the whole batch.

    ``n`` and ``weight`` are sums over all processes; an image that several processes have counts
    once for each of them.
    """

    images: Tensor
    target: Tensor
    n: Tensor  # images of the whole batch
    weight: Tensor | None  # loss weight of the whole batch; None if it depends on predictions
    chunks: int  # parts of this process's share
    copies: int  # processes that have the same images


class ImageTrainer(Trainer):
    """Trains an MDEQ; subclasses add what classification and segmentation do differently.

    Several processes compute what one process would with the same batch: batch norm takes its
    statistics over all processes, and losses are divided by the weight of the whole batch.

    Args:
        device: the model's device; with several ``gpus``, the first of them.
        gpus: the GPUs of this process. More than one makes the model data parallel, unless the
            run has several processes.
        extra_set: data set of a second stage: TRAIN.EXTRA_EPOCH epochs after the first stage.
        resume: what a user adds to continue a run, for messages.
        stopping: collects requests to stop; None makes one with the limit MAX_TIME.

    Raises:
        InputError: the batch is too small for the processes and TRAIN.BATCH_CHUNK, or a data set
            has no batch.
    """

    weights_key = "state_dict"
    extra_parts: ClassVar = {"epoch": 0, "position": 0}
    extra_sums = ("images", "hits", "count")
    drop_last = False  # True leaves out a last batch that is not full
    one_gpu = False  # True allows one GPU per process only: no DataParallel

    def __init__(
        self,
        cfg: CfgNode,
        model: MDEQNet,
        train_set: Dataset,
        valid_set: Dataset,
        device: torch.device,
        gpus: list[int],
        processes: Processes,
        *,
        extra_set: Dataset | None = None,
        resume: str = RESUME,
        stopping: Stopping | None = None,
    ):
        self.cfg, self.valid_set = cfg, valid_set
        self.data = {
            "the training images": fingerprint(train_set),
            "the validation images": fingerprint(valid_set),
        }
        if classes := getattr(train_set, "class_fingerprint", ""):
            self.data["the classes"] = classes
        devices = max(len(gpus), 1) * processes.world_size
        self.batch_size = cfg.TRAIN.BATCH_SIZE or cfg.TRAIN.BATCH_SIZE_PER_GPU * devices
        self.curriculum = Curriculum(
            cfg, train_set, extra_set, batch_size=self.batch_size, drop_last=self.drop_last
        )
        if self.batch_size < processes.world_size * cfg.TRAIN.BATCH_CHUNK:
            raise InputError(
                f"a batch of {self.batch_size} is too small for {processes.world_size} process(es) "
                f"and a TRAIN.BATCH_CHUNK of {cfg.TRAIN.BATCH_CHUNK}"
            )
        if processes.world_size > 1:
            model = convert_sync_batchnorm(model)
        super().__init__(
            model,
            make_optimizer(cfg, model),
            device,
            processes,
            seed=cfg.SEED,
            care=Care(
                keep=cfg.KEEP_CHECKPOINTS,
                max_skipped=cfg.TRAIN.MAX_SKIPPED,
                clip=cfg.TRAIN.CLIP,
                resume=resume,
                way_out="lower TRAIN.LR, or raise LOSS.JAC_LOSS_WEIGHT",
                memory_of_step="raise TRAIN.BATCH_CHUNK, or lower TRAIN.BATCH_SIZE_PER_GPU",
                memory_of_validation=LESS_MEMORY,
            ),
            stopping=stopping or Stopping(cfg.MAX_TIME),
        )
        if model.start is not None:  # its loss shall not change how far the others are clipped
            left_out = set(model.start.parameters())
            self.clipped = [p for p in model.parameters() if p not in left_out]
        if processes.world_size == 1 and len(gpus) > 1:
            # Gather output and sradius along dimension 0; average jac_loss (None).
            self.parallel = BalancedDataParallel(model, -1, 0, (0, None, 0), device_ids=gpus)
        self.epoch, self.position = cfg.TRAIN.BEGIN_EPOCH, 0  # batches done in this epoch
        self.step = self.curriculum.steps_before(self.epoch)
        self.last_step = self.curriculum.steps_before(self.curriculum.last.end)
        self.pretrain_steps = cfg.TRAIN.PRETRAIN_STEPS
        self.events = ImageEvents()

    # ---- what subclasses define ----------------------------------------------------------------

    def weight(self, target: Tensor) -> Tensor | None:
        """What divides the summed loss of these labels, 0-dim; None if it needs predictions."""
        raise NotImplementedError

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch and the weight that divides it, both 0-dim."""
        raise NotImplementedError

    def hits(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The number of right predictions, and of all predictions (samples or pixels)."""
        raise NotImplementedError

    evaluator: Callable[..., Evaluation]  # a function of mdeq_vision.evaluation
    get_dataset: Callable[[CfgNode, str], Dataset]  # a function of mdeq_vision.datasets

    # ---- a step --------------------------------------------------------------------------------

    @property
    def n_batches(self) -> int:
        """The number of batches of the present epoch."""
        return self.curriculum.at(self.epoch).n_batches

    def batches(self) -> Iterator[list[Tensor]]:
        """Yield this process's share (images, labels) of each batch, until the last epoch ends."""
        while self.epoch < self.curriculum.last.end:
            loader = make_loader(
                self.curriculum.at(self.epoch).dataset,
                batch_size=self.batch_size,
                seed=self.cfg.SEED,
                epoch=self.epoch,
                start=self.position,
                shuffle=self.cfg.TRAIN.SHUFFLE,
                drop_last=self.drop_last,
                percent=self.cfg.PERCENT,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                nobody_idle=True,
                workers=self.cfg.WORKERS,
                pin_memory=self.cfg.PIN_MEMORY and self.device.type == "cuda",
            )
            yield from on_device(loader, self.device)

    def draw(self) -> Choices:
        deq, factor = self.cfg.DEQ, self.jac_weight_of(self.step)
        # Draw both in every step, so that the random stream does not depend on the phase.
        delta = self.rng.randint(-deq.RAND_F_THRES_DELTA, 1)
        regularise = self.rng.random() < self.cfg.LOSS.JAC_LOSS_FREQ and factor > 0
        if not regularise or deq.RAND_F_THRES_DELTA == 0:
            delta = 0
        return Choices(max(1, deq.F_THRES + delta), factor if regularise else None)

    def split(self, batch: tuple[Tensor, Tensor]) -> list[BatchPart]:
        # A process may have one image more than another in the last batch. All must still do the
        # same number of forwards, because batch norm communicates in each.
        left = len(self.curriculum.at(self.epoch).dataset) - self.position * self.batch_size
        least = min(left, self.batch_size) // self.processes.world_size
        # A batch with fewer images than processes goes to every process whole.
        copies = self.processes.world_size if least == 0 else 1
        chunks = min(self.cfg.TRAIN.BATCH_CHUNK, least or left)
        images, target = batch
        own = [torch.tensor(len(images), device=self.device), self.weight(target)]
        n, *weight = self.processes.sum(torch.stack([c.double() for c in own if c is not None]))
        of_all = {"n": n, "weight": weight[0] if weight else None}
        return [
            BatchPart(*part, **of_all, chunks=chunks, copies=copies)
            for part in zip(images.tensor_split(chunks), target.tensor_split(chunks), strict=True)
        ]

    def part(self, index: int, part: BatchPart, choices: Choices) -> Summands:
        images, target = part.images, part.target
        copied = self._alike() if part.copies > 1 else contextlib.nullcontext()
        with autocast(self.cfg.AMP, self.device), copied:
            output, jac_loss, _ = self.parallel(
                images,
                train_step=self.step,
                compute_jac_loss=choices.jac_weight is not None,
                f_thres=choices.f_thres,
                b_thres=self.cfg.DEQ.B_THRES,
            )
        output = output.to(images.dtype)
        total, weight = self.loss(output, target)
        if part.weight is None:
            # Hard example mining: each part has its own mean over all processes.
            weight = self.processes.sum(weight.detach().double()) * part.chunks
        else:
            weight = part.weight
        jac_loss = jac_loss.mean() * (len(images) / part.n).to(jac_loss.dtype)
        figures = [torch.tensor(len(images), device=self.device)]
        figures += self.hits(output.detach(), target)
        figures = [figure.double() / part.copies for figure in figures]
        return Summands(mean_loss(total, weight.to(total)), jac_loss, figures)

    @contextlib.contextmanager
    def _alike(self) -> Iterator[None]:
        """Within a ``with`` block, all processes compute the same on the same images.

        Batch norm uses the process's own images, and all processes draw the same random numbers.
        """
        gpus = [self.device] if self.device.type == "cuda" else []
        with each_by_itself(self.model), torch.random.fork_rng(gpus):
            torch.manual_seed(self.cfg.SEED + self.step)
            yield

    def set_learning_rate(self) -> None:
        first, last = self.curriculum.first, self.curriculum.last
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step, first.n_batches, last.n_batches)

    def advance(self, batch: tuple[Tensor, Tensor], loss: float) -> None:
        self.position += 1

    def jac_weight_of(self, step: int) -> float:
        return jac_factor(self.cfg, step, self.epoch)

    # ---- log and validation --------------------------------------------------------------------

    def due(self) -> tuple[bool, bool, bool]:
        cfg = self.cfg
        border = self.step == cfg.TRAIN.PRETRAIN_STEPS
        log = self.step % cfg.PRINT_FREQ == 0 or border or self.step == self.last_step
        save = cfg.SAVE_FREQ > 0 and self.step % cfg.SAVE_FREQ == 0
        return log, border or self.position == self.n_batches, save

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        window, lr = self._window, self.optimizer.param_groups[0]["lr"]
        accuracy = window["hits"] / max(window["count"], 1)
        speed, steps = window["images"] / elapsed, window["steps"] + window["skipped"]
        values = {"loss": loss, "accuracy": accuracy, "lr": lr, "images_per_s": speed}
        return values, (
            f"epoch {self.epoch} [{self.position}/{self.n_batches}] | step {self.step} | "
            f"lr {lr:.3g} | {1000 * elapsed / steps:.0f} ms/step | {speed:.1f} images/s | "
            f"loss {loss:.4f} | accuracy {100 * accuracy:.2f}%"
        )

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Evaluate the current weights in the phase of the last update."""
        return self._evaluate(dataset, self.cfg, self.step - 1)

    def _evaluate(
        self, dataset: Dataset, cfg: CfgNode, train_step: int, on_prediction: Callable | None = None
    ) -> Evaluation:
        return self.evaluator(
            cfg,
            self.model,
            dataset,
            train_step=train_step,
            device=self.device,
            processes=self.processes,
            on_prediction=on_prediction,
            stop=lambda: self.stopping.wanted,
        )

    def rehearse(self) -> None:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.WORKERS = 0  # processes would take longer to start than a batch to load
        cfg.TEST.NUM_SAMPLES = cfg.TEST.BATCH_SIZE_PER_GPU * self.processes.world_size
        self._evaluate(self.valid_set, cfg, self.step)

    def validate(self) -> tuple[Evaluation, dict, str, float]:
        self.events.begin()
        keep = self.events.keep if self.run.folder else None
        found = self._evaluate(self.valid_set, self.cfg, self.step - 1, keep)
        record = {"text": found.text(), **found.figures}
        return found, record, found.score, found.figures[found.score]

    def after_validation(self, found: Evaluation) -> None:
        border, data = self.pretrain_steps, self.valid_set
        self.events.after_validation(self.run, self.step, border, data, found.score)
        if self.position == self.n_batches:
            self.next_epoch()

    def next_epoch(self) -> None:
        """Begin the next epoch, perhaps the extra stage."""
        before = self.curriculum.at(self.epoch)
        self.epoch, self.position = self.epoch + 1, 0
        if self.curriculum.at(self.epoch) is not before:
            self.run.log(f"step {self.step} | the extra stage begins at epoch {self.epoch}")

    # ---- checkpoints ---------------------------------------------------------------------------

    def extra_state(self) -> dict:
        return {"epoch": self.epoch, "position": self.position, "n_batches": self.n_batches}

    def load_extra(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        n_batches = state.get("n_batches", self.n_batches)
        check_form(n_batches, 0, "n_batches")
        self.curriculum.check_place(self.step, self.epoch, self.position, n_batches)

    def fixed(self) -> dict:
        train = self.cfg.TRAIN
        return {
            "TRAIN.OPTIMIZER": train.OPTIMIZER,
            "an effective batch size of": self.batch_size,
            "a number of batches per epoch of": self.curriculum.first.n_batches,
            "SEED": self.cfg.SEED,
            **self.data,
            # The optimiser then keeps a state that rmsprop cannot begin later.
            _MOMENTUM: train.OPTIMIZER == "rmsprop" and train.MOMENTUM > 0,
        }

    def fixed_in(self, state: dict) -> dict:
        own = self.fixed()  # older checkpoints do not have these
        return {name: own[name] for name in (*self.data, _MOMENTUM)} | state["fixed"]
