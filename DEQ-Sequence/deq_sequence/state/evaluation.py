"""Evaluation of state tracking: whole strings right, at one length."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_sequence.model import DEQTransformerLM
from deq_sequence.state.strings import StateStrings
from lib.runs.evaluation_loop import evaluate_batches
from lib.runs.processes import Processes
from lib.solvers.precision import autocast

FACTORS = (1, 2, 4, 8)  # the final evaluation: lengths in multiples of --tgt_len
STRINGS = 100  # of one evaluation, unless --max_eval_steps cuts it short
_ALONE = Processes()


@dataclass
class StateEvaluation:
    """What was found on strings of one length, and means of the forward solver's statistics."""

    length: int
    strings: int
    exact: float  # share of strings with all answers right
    accuracy: float  # share of right answers
    loss: float  # nats per answer
    nfe: float
    abs_residual: float
    rel_residual: float

    def text(self) -> str:
        """One line for the log."""
        solver = f" | f res {self.rel_residual:.2e} nfe {self.nfe:.1f}" if self.nfe else ""
        return (
            f"length {self.length} | exact {self.exact:.3f} of {self.strings} | "
            f"answers {self.accuracy:.4f} | loss {self.loss:.5f}{solver}"
        )


def threshold(args: argparse.Namespace, length: int) -> int:
    """Upper end of the forward threshold in training, for strings of a length."""
    return args.f_thres + round(args.f_thres_per_word * length)


def evaluation_threshold(args: argparse.Namespace, length: int) -> int:
    """Forward threshold of an evaluation: twice that of training, as the tolerance ends a solve."""
    return 2 * threshold(args, length)


def evaluate_states(
    model: DEQTransformerLM,
    strings: StateStrings,
    args: argparse.Namespace,
    split: str,
    length: int,
    *,
    train_step: int = -1,
    processes: Processes = _ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> StateEvaluation:
    """Evaluate ``model`` on the first strings of ``split`` with ``length`` elements each.

    Args:
        args: the settings of the run.
        train_step: selects the phase, as in the model's forward; -1 is equilibrium.
        processes, stop: as for :func:`lib.runs.evaluation_loop.evaluate_batches`.

    Raises:
        EvaluationStopped: raised in all processes if ``stop`` returned True in one of them.
    """
    device = next(model.parameters()).device
    number = args.eval_batch_size
    own = processes.part(number)
    count = math.ceil(STRINGS / number)
    if args.max_eval_steps > 0:
        count = min(count, args.max_eval_steps)

    def measure(index: int) -> dict[str, Tensor | int]:
        drawn = strings.draw(split, index, number, length)
        words, answers = (part[:, own].to(device) for part in drawn)
        with autocast(args.amp, device):
            found = model.log_probs(words, train_step, evaluation_threshold(args, length))[1:]
        right = found.argmax(-1) == answers
        nll = -found.gather(-1, answers[..., None])
        return {
            "exact": right.all(0).sum(),
            "right": right.sum(),
            "loss": nll.double().sum(),
            "strings": answers.shape[1],
        }

    batches = range(count) if own.start < own.stop else ()
    with torch.no_grad():
        sums, means = evaluate_batches(model, batches, measure, processes=processes, stop=stop)
    answers = sums["strings"] * length
    return StateEvaluation(
        length=length,
        strings=int(sums["strings"]),
        exact=sums["exact"] / sums["strings"],
        accuracy=sums["right"] / answers,
        loss=sums["loss"] / answers,
        nfe=means["nfe"],
        abs_residual=means["abs_residual"],
        rel_residual=means["rel_residual"],
    )
