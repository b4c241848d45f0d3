"""Evaluation with memory carried over the whole text."""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.iterators import LMOrderedIterator
from lib.runs.evaluation_loop import evaluate_batches
from lib.runs.processes import Processes
from lib.solvers.precision import autocast

_ALONE = Processes()
LESS_MEMORY = "lower --eval_batch_size or --eval_tgt_len"  # advice for an evaluation


def perplexity(loss: float) -> float:
    """exp(loss); inf if this overflows, NaN if the loss is NaN."""
    return math.inf if loss > 700 else math.exp(loss)


@dataclass
class Evaluation:
    """Loss per token in nats, and means of the forward solver's statistics."""

    loss: float
    tokens: int
    nfe: float
    abs_residual: float
    rel_residual: float
    sradius: float | None  # mean spectral radius over samples and segments; None if not computed

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits(self) -> float:
        """Loss in bits per symbol."""
        return self.loss / math.log(2)

    def text(self, characters: bool) -> str:
        """One line for the log, with bits per character (``characters``) or the perplexity."""
        figure = f"bpc {self.bits:.5f}" if characters else f"ppl {self.perplexity:.3f}"
        solver = f" | f res {self.rel_residual:.2e} nfe {self.nfe:.1f}" if self.nfe else ""
        radius = "" if self.sradius is None else f" | spectral radius {self.sradius:.3f}"
        return f"loss {self.loss:.5f} {figure}{solver}{radius}"


def settings_from(args: argparse.Namespace) -> dict:
    """The keyword arguments of :func:`evaluate` that the command line sets."""
    return {
        "batch_size": args.eval_batch_size,
        "tgt_len": args.eval_tgt_len,
        "mem_len": args.mem_len,
        "f_thres": args.f_thres,
        "max_steps": args.max_eval_steps,
        "spectral_radius": args.spectral_radius_mode,
        "amp": args.amp,
    }


def evaluate(
    model: DEQTransformerLM,
    data: torch.Tensor,
    *,
    batch_size: int,
    tgt_len: int,
    mem_len: int,
    f_thres: int,
    train_step: int = -1,
    max_steps: int = -1,
    spectral_radius: bool = False,
    amp: str = "none",
    processes: Processes = _ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Compute the mean loss of ``model`` on a text, segment by segment, with memory in between.

    Args:
        data: (tokens,) word ids.
        batch_size: number of streams into which the text is cut; the processes share them.
        tgt_len, mem_len: segment and memory lengths; the model's own are restored afterwards.
        train_step: selects the phase, as in the model's forward; -1 is equilibrium.
        max_steps: maximal number of segments; -1 means all.
        spectral_radius: also compute the spectral radius (150 Jacobian products per segment).
        processes, stop: as for :func:`lib.runs.evaluation_loop.evaluate_batches`.

    Raises:
        EvaluationStopped: raised in all processes if ``stop`` returned True in one of them.
    """
    device = next(model.parameters()).device
    streams = processes.part(batch_size)
    iterator = LMOrderedIterator(data, batch_size, tgt_len, device=device, streams=streams)
    own = streams.stop - streams.start
    lengths = model.tgt_len, model.mem_len
    mems: list[torch.Tensor] = []

    def measure(segment: tuple[torch.Tensor, torch.Tensor, int]) -> dict:
        nonlocal mems
        words, target, seq_len = segment
        with autocast(amp, device):
            loss, _, sradius, *mems = model(
                words,
                target,
                mems,
                train_step=train_step,
                f_thres=f_thres,
                compute_jac_loss=False,
                spectral_radius_mode=spectral_radius,
            )
        sums = {"loss": loss.double().sum(), "tokens": seq_len * own, "samples": own}
        return sums | {"radius": sradius.double().sum()} if spectral_radius else sums

    # A process without a stream has no segments; it waits in the sums for the others.
    segments = itertools.islice(iterator, None if max_steps < 0 else max_steps) if own else ()
    try:
        model.reset_length(tgt_len, mem_len)
        sums, means = evaluate_batches(model, segments, measure, processes=processes, stop=stop)
    finally:
        model.reset_length(*lengths)
    # In the stacked phase (no solves) there is no equilibrium and no spectral radius.
    solved = spectral_radius and means["nfe"]
    return Evaluation(
        loss=sums["loss"] / sums["tokens"],
        tokens=int(sums["tokens"]),
        nfe=means["nfe"],
        abs_residual=means["abs_residual"],
        rel_residual=means["rel_residual"],
        sradius=sums["radius"] / sums["samples"] if solved else None,
    )
