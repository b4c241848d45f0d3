"""Whether bf16 costs time on this machine."""

import argparse
import time

import torch

from deq_sequence.model import DEQTransformerLM
from lib.solvers.precision import AMP, autocast

_TOKENS = 512  # at most, in a measured batch of several sequences
_ROUNDS, _MARGIN = 3, 1.05


def amp_notes(args: argparse.Namespace, model: DEQTransformerLM, device: torch.device) -> list[str]:
    """A line if ``--amp bf16`` makes f slower on this CPU, else none.

    Without instructions for bfloat16, a processor computes each product in float32 after a
    conversion; and small models spend more time on conversions than on products.
    """
    if args.amp == "none" or device.type != "cpu":
        return []
    sequences = max(1, min(args.batch_size // args.batch_chunk, _TOKENS // args.tgt_len))
    ratio = slowdown(model, sequences, args.tgt_len, args.mem_len)
    if ratio < _MARGIN:
        return []
    return [
        f"note: --amp {args.amp} is slower than float32 here: an evaluation of f takes "
        f"{ratio:.1f} times as long on this processor; --amp none is faster"
    ]


@torch.no_grad()
def slowdown(model: DEQTransformerLM, sequences: int, tgt_len: int, mem_len: int) -> float:
    """Time of an evaluation of f in bf16, divided by that in float32.

    Each is the shortest of some rounds. No random numbers are drawn.
    """
    device = model.pos_emb.inv_freq.device
    d, length, training = model.d_model, mem_len + tgt_len, model.func.training
    us = torch.zeros(sequences, length, 3 * d, device=device)
    z = torch.zeros(sequences, tgt_len, d, device=device)
    times = dict.fromkeys(AMP, float("inf"))
    model.func.eval()  # no dropout masks
    try:
        maps = {}
        for amp in AMP:
            with autocast(amp, device):
                maps[amp] = model.func.prepare(us, us[:, :mem_len, :d], model.pos_emb(length))
        for turn in range(1 + _ROUNDS):
            for amp, f in maps.items():
                with autocast(amp, device):
                    start = time.perf_counter()
                    f.plain(z)  # never compiled
                    spent = time.perf_counter() - start
                if turn:
                    times[amp] = min(times[amp], spent)
    finally:
        model.func.train(training)
    return times["bf16"] / times["none"]
