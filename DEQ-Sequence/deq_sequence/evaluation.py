"""Evaluation with memory carried over the whole text."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deq_sequence.iterators import LMOrderedIterator
from deq_sequence.model import DEQTransformerLM
from lib.distributed import Processes
from lib.precision import autocast
from lib.training import EvaluationStopped, evaluating, summed_stats

_ALONE = Processes()


def perplexity(loss: float) -> float:
    """exp(loss); inf where that overflows, NaN where the loss is."""
    return math.inf if loss > 700 else math.exp(loss)


@dataclass
class Evaluation:
    """Loss per token in nats, and what the solver did on the way."""

    loss: float
    tokens: int
    nfe: float
    abs_residual: float
    rel_residual: float
    sradius: float | None  # mean over samples and segments, if asked for

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits(self) -> float:
        """Bits per symbol."""
        return self.loss / math.log(2)

    def text(self, characters: bool) -> str:
        """The figure that is usual: bits per character, or perplexity."""
        figure = f"bpc {self.bits:.5f}" if characters else f"ppl {self.perplexity:.3f}"
        solver = f" | f res {self.rel_residual:.2e} nfe {self.nfe:.1f}" if self.nfe else ""
        radius = "" if self.sradius is None else f" | spectral radius {self.sradius:.3f}"
        return f"loss {self.loss:.5f} {figure}{solver}{radius}"


def settings_from(args: argparse.Namespace) -> dict:
    """The keyword arguments of :func:`evaluate` that the command line decides."""
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
    """Mean loss of ``model`` on a text, segment after segment with memory between them.

    Args:
        data: (tokens,) word ids.
        batch_size: the text is cut into this many streams, which the processes share.
        tgt_len, mem_len: segment and memory lengths; the model's own are put back afterwards.
        train_step: decides the phase, as in the model's forward; -1 is equilibrium.
        max_steps: segments at most; -1 is all.
        spectral_radius: compute it too (150 products with the Jacobian per segment).
        processes: every one of them has to call this, with the same arguments.
        stop: asked before each segment; whether to break off.

    Raises:
        EvaluationStopped: in all processes, if ``stop`` told one of them so.
    """
    device = next(model.parameters()).device
    streams = processes.part(batch_size)
    iterator = LMOrderedIterator(data, batch_size, tgt_len, device=device, streams=streams)
    own = streams.stop - streams.start
    total, tokens, radii, stopped, mems = 0.0, 0, [], False, []
    lengths = model.tgt_len, model.mem_len
    try:
        model.reset_length(tgt_len, mem_len)
        with evaluating(model) as stats:
            # A process without a stream waits for the others.
            for index, (words, target, seq_len) in enumerate(iterator if own else ()):
                stopped = stop()
                if index == max_steps or stopped:
                    break
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
                total += loss.double().sum()
                tokens += seq_len * own
                if spectral_radius:
                    radii.append(sradius.double().sum())
            means = summed_stats(stats, processes).forward.means()
    finally:
        model.reset_length(*lengths)
    sums = [float(total), tokens, float(sum(radii)), len(radii) * own, stopped]
    sums = processes.sum(torch.tensor(sums, dtype=torch.float64))
    total, tokens, radius, n_radii, stopped = sums.tolist()
    if stopped:
        raise EvaluationStopped
    return Evaluation(
        loss=total / tokens,
        tokens=int(tokens),
        nfe=means["nfe"],
        abs_residual=means["abs_residual"],
        rel_residual=means["rel_residual"],
        # A stacked network has no equilibrium to take it at.
        sradius=radius / n_radii if n_radii and means["nfe"] else None,
    )
