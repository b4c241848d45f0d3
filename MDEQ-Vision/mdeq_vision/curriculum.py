"""The data sets of a run over its epochs: the training set, then perhaps an extra set."""

from dataclasses import dataclass

from torch.utils.data import Dataset
from yacs.config import CfgNode

from lib.errors import InputError, naming
from mdeq_vision.datasets import n_batches


@dataclass(frozen=True)
class Stage:
    """The epochs of a run over one data set, ``n_batches`` steps each."""

    dataset: Dataset
    n_batches: int
    end: int  # the first epoch after the stage


class Curriculum:
    """END_EPOCH epochs over ``train_set``, then EXTRA_EPOCH epochs over ``extra_set`` if given.

    Args:
        batch_size: samples per step over all devices.
        drop_last: leave out a last batch that is not full.

    Raises:
        InputError: a data set does not fill a single batch.
    """

    def __init__(
        self,
        cfg: CfgNode,
        train_set: Dataset,
        extra_set: Dataset | None,
        *,
        batch_size: int,
        drop_last: bool,
    ):
        def stage(dataset: Dataset, end: int) -> Stage:
            batches = n_batches(len(dataset), batch_size, drop_last=drop_last, percent=cfg.PERCENT)
            return Stage(dataset, batches, end)

        self.first = self.last = stage(train_set, cfg.TRAIN.END_EPOCH)
        if extra_set is not None:
            with naming("DATASET.EXTRA_TRAIN_SET"):
                self.last = stage(extra_set, cfg.TRAIN.END_EPOCH + cfg.TRAIN.EXTRA_EPOCH)

    def at(self, epoch: int) -> Stage:
        """The stage of ``epoch``; epochs count from 0 through both stages."""
        return self.first if epoch < self.first.end else self.last

    def steps_before(self, epoch: int) -> int:
        """The number of steps in all epochs before ``epoch``."""
        in_first = min(epoch, self.first.end) if self.last is not self.first else epoch
        return in_first * self.first.n_batches + (epoch - in_first) * self.last.n_batches

    def check_place(self, step: int, epoch: int, position: int, n_batches: int) -> None:
        """Refuse a checkpoint after ``step`` updates whose place does not fit these stages.

        It was saved after ``position`` of ``n_batches`` batches of ``epoch``.
        """
        moved = step != self.steps_before(epoch) + position or position > n_batches
        # At position 0 no image of the epoch is used yet, so its data set may change.
        if moved or (position and n_batches != self.at(epoch).n_batches):
            raise InputError(
                f"the checkpoint was saved at step {step}, after {position} of {n_batches} batches "
                f"of epoch {epoch}, which is another place with TRAIN.END_EPOCH {self.first.end} "
                f"and the present DATASET.EXTRA_TRAIN_SET: continue with those of the run"
            )
