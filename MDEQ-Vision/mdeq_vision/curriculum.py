"""Which images a run trains on, and when: the training set, then perhaps an extra one."""

from dataclasses import dataclass

from torch.utils.data import Dataset
from yacs.config import CfgNode

from lib.errors import InputError, naming
from mdeq_vision.datasets import n_batches


@dataclass(frozen=True)
class Stage:
    """Epochs of a run over one data set, each of ``n_batches`` steps, up to epoch ``end``."""

    dataset: Dataset
    n_batches: int
    end: int  # the first epoch after it


class Curriculum:
    """END_EPOCH epochs over ``train_set``, then EXTRA_EPOCH over ``extra_set``, if there is one.

    Args:
        cfg: the configuration.
        train_set, extra_set: data sets; None is no second stage.
        batch_size: over all devices.
        drop_last: leave out a last batch that is not full.

    Raises:
        InputError: a data set without a single batch.
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
        """The stage of an epoch, counted from 0 over both."""
        return self.first if epoch < self.first.end else self.last

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before ``epoch``."""
        in_first = min(epoch, self.first.end) if self.last is not self.first else epoch
        return in_first * self.first.n_batches + (epoch - in_first) * self.last.n_batches

    def check_place(self, step: int, epoch: int, position: int, n_batches: int) -> None:
        """Refuse a checkpoint's place in the data if other stages give it another meaning.

        Args:
            step: updates done.
            epoch, position: where that was, ``position`` batches into the epoch.
            n_batches: of that epoch.
        """
        moved = step != self.steps_before(epoch) + position
        # Between two epochs, the next one may be over any images.
        if moved or (position and n_batches != self.at(epoch).n_batches):
            raise InputError(
                f"the checkpoint was saved at step {step}, after {position} of {n_batches} batches "
                f"of epoch {epoch}, which is another place with TRAIN.END_EPOCH {self.first.end} "
                f"and the present DATASET.EXTRA_TRAIN_SET: continue with those of the run"
            )
