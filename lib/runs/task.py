"""What the trainer of a task defines: its data, losses, schedule and figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Care:
    """How a run is protected against divergence and interruption; texts are for messages."""

    keep: int  # number of checkpoints kept, including the newest
    max_skipped: int  # the run ends after this many non-finite steps in a row
    clip: float  # largest gradient norm; 0 or less turns clipping off
    resume: str  # the option that continues a run, such as '--restart'
    way_out: str  # advice against non-finite numbers
    memory_of_step: str = ""  # advice if the memory is too small for a step,
    memory_of_validation: str = ""  # or for a validation


@dataclass(frozen=True)
class Choices:
    """The random choices of a step, the same in all processes."""

    f_thres: int  # threshold of the forward solver
    jac_weight: float | None = None  # of the Jacobian loss; None: not computed in this step


class Summands(NamedTuple):
    """What one part of a batch adds to the figures of the whole batch; all are 0-dim tensors.

    So the loss is the part's sum, divided by the size of the whole batch: over all parts and
    processes the losses add up to the mean.
    """

    loss: Tensor  # to the mean loss
    jac_loss: Tensor  # to the mean Jacobian loss; 0 in a step that does not compute it
    extra: list[Tensor]  # to each of ``Task.extra_sums``


class Task:
    """What every trainer defines for its task."""

    extra_sums: tuple[str, ...] = ()  # names of the sums that ``part`` returns beside the losses
    weights_key = "model"  # the checkpoint's entry with the model's weights
    # Checkpoint entries that ``extra_state`` adds, and their forms (see checkpoint.check_form).
    extra_parts: ClassVar[dict[str, Any]] = {}
    last_step: int
    pretrain_steps: int  # the length of the stacked phase

    # ---- a step --------------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """Yield this process's share of each batch, from the present position to ``last_step``."""
        raise NotImplementedError

    def draw(self) -> Choices:
        """Make the random choices of a step, with the same number of draws in both phases."""
        raise NotImplementedError

    def split(self, batch: Any) -> Sequence[Any]:
        """Split this process's share of a batch into parts, which the model takes one by one."""
        raise NotImplementedError

    def part(self, index: int, part: Any, choices: Choices) -> Summands:
        """Run one forward pass on a part; keep the memory for this part of the next batch."""
        raise NotImplementedError

    def set_learning_rate(self) -> None:
        """Set the learning rate of the coming update."""
        raise NotImplementedError

    def advance(self, batch: Any, loss: float) -> None:
        """Move past ``batch``, whose mean loss was ``loss``, not finite in a skipped step."""
        raise NotImplementedError

    def forget(self) -> None:
        """Discard what a skipped step may have spoilt: the memory."""

    def jac_weight_of(self, step: int) -> float:
        """Weight of the Jacobian loss in update ``step``."""
        raise NotImplementedError

    # ---- log and validation --------------------------------------------------------------------

    def due(self) -> tuple[bool, bool, bool]:
        """Whether to log, to validate, and to save after the last step."""
        raise NotImplementedError

    def validate(self) -> tuple[Any, dict, str, float]:
        """Evaluate in the phase of the last update.

        Returns:
            What ``after_validation`` needs; values for metrics, plus ``text`` for the log; the
            score's name; the score (higher is better).
        """
        raise NotImplementedError

    def rehearse(self) -> None:
        """Evaluate the first validation batch in the phase of the coming step."""

    def after_validation(self, found: Any) -> None:
        """Update what depends on the validation, such as a schedule or the epoch."""

    def figures(self, loss: float, elapsed: float) -> tuple[dict, str]:
        """Return metrics values and a log line for the steps since the last log line."""
        raise NotImplementedError

    # ---- checkpoints ---------------------------------------------------------------------------

    def extra_state(self) -> dict:
        """Return the checkpoint entries named in ``extra_parts``."""
        raise NotImplementedError

    def load_extra(self, state: dict) -> None:
        """Restore what ``extra_state`` returned; refuse what does not fit this run."""
        raise NotImplementedError

    def fixed(self) -> dict:
        """Return by name the settings that must not change between a save and a resume."""
        raise NotImplementedError

    def fixed_in(self, state: dict) -> dict:
        """Return them from a checkpoint, also from one older than a setting."""
        return state["fixed"]
