"""Figures of every token of a text: -log p, residual, evaluations of f."""

import csv
import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_sequence.evaluation import Evaluation
from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.iterators import LMOrderedIterator
from deq_sequence.text.vocabulary import Vocab
from lib.runs.evaluation_loop import evaluating


@dataclass(frozen=True)
class TokenFigures:
    """Figures of the tokens of a text, from its second one on; each list has one per token.

    Attributes:
        tokens: their ids.
        loss: -log p of each, in nats.
        residual: the relative residual of the state that predicts it.
        evaluations: evaluations of f in the solve of that state, which the tokens of a segment
            share.
    """

    tokens: list[int]
    loss: list[float]
    residual: list[float]
    evaluations: list[int]
    mean: Evaluation

    def as_csv(self, vocab: Vocab) -> str:
        """A table with a head: token, -log p, residual, evaluations."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["token", "minus_log_p", "residual", "evaluations"])
        columns = vocab.decode(self.tokens), self.loss, self.residual, self.evaluations
        for token, loss, residual, evaluations in zip(*columns, strict=True):
            rows.writerow([token, f"{loss:.6g}", f"{residual:.6g}", evaluations])
        return text.getvalue()


def token_figures(
    model: DEQTransformerLM, ids: Tensor, *, tgt_len: int, mem_len: int, f_thres: int
) -> TokenFigures:
    """Evaluate a text, (tokens,), as one stream, segment by segment, with memory in between.

    The text and the arguments are those of :func:`deq_sequence.evaluation.evaluate`.
    """
    device = next(model.parameters()).device
    segments = LMOrderedIterator(ids, 1, tgt_len, device=device)
    lengths = model.tgt_len, model.mem_len
    mems: list[Tensor] = []
    losses, residuals, evaluations = [], [], []
    try:
        model.reset_length(tgt_len, mem_len)
        with evaluating(model) as stats:
            for data, target, length in segments:
                loss, residual, mems = model.token_figures(data, target, mems, f_thres)
                losses.append(loss[:, 0])
                residuals.append(residual[:, 0])
                evaluations += [stats.forward.last["nfe"]] * length
            means = stats.forward.means()
    finally:
        model.reset_length(*lengths)
    loss, residual = torch.cat(losses).tolist(), torch.cat(residuals).tolist()
    mean = Evaluation(
        math.fsum(loss) / len(loss),
        len(loss),
        means["nfe"],
        means["abs_residual"],
        means["rel_residual"],
        None,
    )
    return TokenFigures(ids[1:].tolist(), loss, residual, evaluations, mean)
