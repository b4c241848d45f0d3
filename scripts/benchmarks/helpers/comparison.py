"""One way to solve and differentiate, trained from a common start; what its gradients are worth.

Everything is on one thread, so that two runs can go side by side on two cores.
"""

import copy
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from deq_sequence.command import build_model
from deq_sequence.evaluation import perplexity
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from helpers.measure import peak_tensor_bytes
from helpers.trainers import image_configuration, next_step, words_arguments
from lib.deq import DEQ, DEQWarning
from lib.gradients import get_gradient
from lib.runs.checkpoint import load, save_atomic
from lib.runs.figures import PASSES
from lib.runs.processes import Processes
from lib.runs.trainer import Trainer
from mdeq_vision.datasets import get_cls_dataset
from mdeq_vision.model import get_cls_net
from mdeq_vision.tasks import ClassificationTrainer

TASKS = ("words", "digits")
FIGURE = {"words": "perplexity", "digits": "accuracy"}
_CPU, _END = torch.device("cpu"), 10**6
# The exact gradient: fixed point and adjoint to 1e-6, or as far as so many evaluations bring them.
_EXACT_SOLVERS, _EXACT_THRESHOLD = ("broyden:eps=1e-6", "gmres:eps=1e-6"), 150
_PROBED = 4  # sequences of a training batch, or as many times 4 images
_RADIUS_PRODUCTS = 60


@dataclass(frozen=True)
class Variant:
    """How the equilibrium is solved and differentiated; thresholds count evaluations."""

    grad: str
    f_solver: str = "anderson"
    b_solver: str = "broyden"
    f_thres: int = 6
    b_thres: int = 6

    @property
    def name(self) -> str:
        backward = f" / {self.b_solver} {self.b_thres}" if self.grad == "ift" else ""
        own = self.grad.partition(":")[0] in ("reversible", "unroll")
        forward = str(self.f_thres) if own else f"{self.f_solver} {self.f_thres}"
        return f"{self.grad}, {forward}{backward}"


@dataclass(frozen=True)
class Plan:
    """What all variants of a task share."""

    task: str
    stacked: int  # steps of the common start
    steps: int  # at equilibrium
    seconds: float  # of training, to which the same-time column belongs
    rates: tuple[float, float]  # learning rates of the two phases
    jac_weight: float
    probes: int = 4  # beside that of the start
    tiny: bool = False


@dataclass
class Outcome:
    """What a run came to."""

    variant: dict
    regularised: bool
    at_steps: dict = field(default_factory=dict)  # figures of the validation after plan.steps
    at_seconds: dict = field(default_factory=dict)  # after plan.seconds of training
    seconds_per_step: float = 0.0
    forward_nfe: float = 0.0
    backward_nfe: float = 0.0
    skipped: int = 0
    peak_mib: float = 0.0  # of tensors, in a training step (with the Jacobian loss, if any)
    curve: list[dict] = field(default_factory=list)  # means since the entry before
    probes: list[dict] = field(default_factory=list)


def make_start(plan: Plan, path: Path) -> dict:
    """Train the stacked phase, and keep its state in a file; the figures of its validation."""
    torch.set_num_threads(1)
    trainer = _trainer(plan, Variant("ift"), plan.stacked, 0.0)
    _set_rate(trainer, plan.rates[0])
    batches = trainer.batches()
    for _ in range(plan.stacked):
        next_step(trainer, batches)
    save_atomic(trainer.state_dict(), path)
    return _figures(trainer)


def run_variant(plan: Plan, variant: Variant, regularised: bool, path: Path) -> dict:
    """Train from the start in ``path``, in a process of its own; an :class:`Outcome` as a dict."""
    warnings.simplefilter("ignore", DEQWarning)
    torch.set_num_threads(1)
    trainer = _trainer(plan, variant, plan.stacked, plan.jac_weight if regularised else 0.0)
    trainer.load_state_dict(load(path), path)
    _set_rate(trainer, plan.rates[1])
    outcome = Outcome(asdict(variant), regularised)
    batches, spent, steps = trainer.batches(), 0.0, 0
    every = max(plan.steps // plan.probes, 1)
    probed = next(_trainer(plan, variant, 0, 0.0).batches())
    outcome.probes.append(_probe(trainer, variant, probed, steps))
    trainer.begin_window()
    while steps < plan.steps or spent < plan.seconds:
        begin = time.perf_counter()
        next_step(trainer, batches)
        spent, steps = spent + time.perf_counter() - begin, steps + 1
        if steps == plan.steps:
            outcome.seconds_per_step = spent / steps
            outcome.skipped = trainer.counts["skipped"]
            outcome.at_steps = _figures(trainer) | {"seconds": spent}
        if spent >= plan.seconds and not outcome.at_seconds:
            outcome.at_seconds = _figures(trainer) | {"steps": steps}
        if steps % every == 0 and steps <= plan.steps:
            outcome.curve.append({"step": steps, "seconds": spent, **_means(trainer)})
            trainer.begin_window()
            outcome.probes.append(_probe(trainer, variant, probed, steps))
    outcome.forward_nfe, outcome.backward_nfe = (
        sum(entry[f"{which}_nfe"] for entry in outcome.curve) / len(outcome.curve)
        for which in PASSES
    )
    trainer.rng.random = lambda: 0.0  # a step with the Jacobian loss, if the run has one
    outcome.peak_mib = peak_tensor_bytes(lambda: next_step(trainer, batches)) / 2**20
    return asdict(outcome)


# ---- trainers --------------------------------------------------------------------------------


def _trainer(plan: Plan, variant: Variant, stacked: int, jac_weight: float) -> Trainer:
    if plan.task == "words":
        return _words(plan, variant, stacked, jac_weight)
    return _digits(plan, variant, stacked, jac_weight)


def _words(plan: Plan, variant: Variant, stacked: int, jac_weight: float) -> LMTrainer:
    flags = f"""
        --f_solver {variant.f_solver} --b_solver {variant.b_solver} --grad {variant.grad}
        --f_thres {variant.f_thres} --b_thres {variant.b_thres} --scheduler constant
        --pretrain_steps {stacked} --max_step {_END} --jac_loss_weight {jac_weight}
        --jac_loss_freq {0.3 if jac_weight else 0.0}
    """
    args = words_arguments(flags, tiny=plan.tiny)
    corpus = get_lm_corpus(args.data, "demo")
    torch.manual_seed(args.seed)
    return LMTrainer(args, build_model(args, corpus, _CPU), corpus, _CPU, Processes())


def _digits(plan: Plan, variant: Variant, stacked: int, jac_weight: float):
    cfg = image_configuration(
        "digits",
        *("DEQ.F_SOLVER", variant.f_solver, "DEQ.B_SOLVER", variant.b_solver),
        *("DEQ.GRAD", variant.grad, "DEQ.F_THRES", variant.f_thres),
        *("DEQ.B_THRES", variant.b_thres, "DEQ.RAND_F_THRES_DELTA", 0),
        *("TRAIN.PRETRAIN_STEPS", stacked, "TRAIN.END_EPOCH", _END),
        *("LOSS.JAC_LOSS_WEIGHT", jac_weight, "LOSS.PRETRAIN_JAC_LOSS_WEIGHT", 0.0),
        tiny=plan.tiny,
    )
    torch.manual_seed(cfg.SEED)
    data = get_cls_dataset(cfg, "train"), get_cls_dataset(cfg, "test")
    return ClassificationTrainer(cfg, get_cls_net(cfg), *data, _CPU, [], Processes())


def _set_rate(trainer: Trainer, rate: float) -> None:
    """A constant learning rate, whatever the setting's schedule says."""

    def constant() -> None:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate

    trainer.set_learning_rate = constant


def _means(trainer: Trainer) -> dict:
    """Training loss and evaluations of the steps since the window began."""
    stats = trainer.model.deq.stats
    nfe = {f"{which}_nfe": getattr(stats, which).means()["nfe"] for which in PASSES}
    return {"loss": trainer.mean_loss(), **nfe}


def _figures(trainer: Trainer) -> dict:
    """Loss and perplexity or accuracy of a validation in the phase of the last update."""
    if isinstance(trainer, LMTrainer):
        found = trainer.evaluate_text(trainer.corpus.valid)
        figures = {"loss": found.loss, "perplexity": perplexity(found.loss)}
    else:
        found, *_ = trainer.validate()
        figures = {"loss": found.figures["loss"], "accuracy": found.figures[found.score]}
    trainer.model.train()
    return figures


# ---- what a gradient is worth ------------------------------------------------------------------


def _probe(trainer: Trainer, variant: Variant, batch, step: int) -> dict:
    """Cosine and length of the gradient against the exact one, residuals, spectral radius.

    On a few samples of one batch, always the same, without dropout; on a copy of the model.
    """
    model = copy.deepcopy(trainer.model).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    deq, radii = model.deq, []

    def solve(*args, **options):
        found = deq(*args, **options | {"sradius_iters": _RADIUS_PRODUCTS * (deq.grad == exactly)})
        radii.append(found.sradius.mean().item())
        return found

    exactly = get_gradient("ift")
    model.deq = solve
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = _gradient(trainer, model, batch, variant.f_thres, variant.b_thres)
        residuals = _residuals(deq, "")
        deq.stats.reset()
        deq.grad = exactly
        deq.f_solver, deq.b_solver = _EXACT_SOLVERS
        torch.manual_seed(0)
        exact = _gradient(trainer, model, batch, _EXACT_THRESHOLD, _EXACT_THRESHOLD)
    return {
        "step": step,
        "cosine": torch.nn.functional.cosine_similarity(own, exact, dim=0).item(),
        "length": (own.norm() / exact.norm()).item(),
        "spectral_radius": radii[-1],
        **residuals,
        **_residuals(deq, "exact_"),
    }


def _residuals(deq: DEQ, prefix: str) -> dict:
    """Relative residuals of the last solves, where there were any."""
    return {
        f"{prefix}{which}_residual": getattr(deq.stats, which).last.get("rel_residual")
        for which in PASSES
    }


def _gradient(trainer: Trainer, model: nn.Module, batch, f_thres: int, b_thres: int) -> Tensor:
    """Of the loss of some samples at equilibrium: one vector."""
    options = {"train_step": -1, "f_thres": f_thres, "b_thres": b_thres, "compute_jac_loss": False}
    if isinstance(trainer, LMTrainer):
        data, target = (part[:, :_PROBED] for part in batch)
        loss = model(data, target, [], **options)[0].mean()
    else:
        images, target = (part[: 4 * _PROBED] for part in batch)
        total, weight = trainer.loss(model(images, **options)[0], target)
        loss = total / weight
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads]).double()
