"""Evaluation with memory carried over the whole text."""

import argparse
import math
from dataclasses import dataclass

import torch

from deq_sequence.iterators import LMOrderedIterator
from deq_sequence.model import DEQTransformerLM
from lib.precision import autocast
from lib.training import evaluating


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
) -> Evaluation:
    """Mean loss of ``model`` on a text, segment after segment with memory between them.

    Args:
        data: (tokens,) word ids.
        batch_size: the text is cut into this many streams.
        tgt_len, mem_len: segment and memory lengths; the model's own are put back afterwards.
        train_step: decides the phase, as in the model's forward; -1 is equilibrium.
        max_steps: segments at most; -1 is all.
        spectral_radius: compute it too (150 products with the Jacobian per segment).
    """
    device = next(model.parameters()).device
    iterator = LMOrderedIterator(data, batch_size, tgt_len, device=device)
    lengths = model.tgt_len, model.mem_len
    total, tokens, radii, mems = torch.zeros((), dtype=torch.float64, device=device), 0, [], []
    try:
        model.reset_length(tgt_len, mem_len)
        with evaluating(model) as stats:
            for index, (words, target, seq_len) in enumerate(iterator):
                if index == max_steps:
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
                tokens += seq_len * batch_size
                if spectral_radius:
                    radii.append(sradius.double().mean())
            means = stats.forward.means()
    finally:
        model.reset_length(*lengths)
    return Evaluation(
        loss=total.item() / tokens,
        tokens=tokens,
        nfe=means["nfe"],
        abs_residual=means["abs_residual"],
        rel_residual=means["rel_residual"],
        # A stacked network has no equilibrium to take it at.
        sradius=torch.stack(radii).mean().item() if radii and means["nfe"] else None,
    )
