"""The three trainers on small models, for tests that stop them by force, and what to compare.

A run takes a second or two: 36 steps through both phases, with everything switched on that
draws random numbers or carries state from step to step, recorded every step, saved every third.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, read_metrics

ROOT = Path(__file__).parents[2]
STEPS, BORDER, SAVED_EVERY = 36, 17, 3

_LANGUAGE = f"""
    --dataset ptb --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --n_layer 2 --eval_n_layer 2
    --init_std 0.2 --tgt_len 8 --mem_len 8 --eval_tgt_len 16 --batch_size 4 --eval_batch_size 4
    --f_thres 6 --b_thres 6 --lr 0.01 --warmup_step 5 --wnorm --dropout 0.1 --dropatt 0.1
    --jac_loss_weight 1 --jac_loss_freq 0.5 --rand_f_thres_delta 2 --batch_chunk 2
    --max_step {STEPS} --pretrain_steps {BORDER} --eval-interval 10 --save-interval {SAVED_EVERY}
    --log-interval 1
"""
_STAGE = "MODEL.EXTRA.FULL_STAGE"
# Small batches to validate on: a signal during a validation is to find it still there.
_IMAGES = f"""
    {_STAGE}.NUM_BRANCHES 2 {_STAGE}.NUM_CHANNELS [8,8] {_STAGE}.HEAD_CHANNELS [4,4]
    {_STAGE}.NUM_BLOCKS [1,1] {_STAGE}.BIG_KERNELS [0,0] MODEL.NUM_LAYERS 2 MODEL.DROPOUT 0.1
    DEQ.F_THRES 4 DEQ.B_THRES 4 DEQ.RAND_F_THRES_DELTA 2 DEQ.SPECTRAL_RADIUS_MODE False
    LOSS.JAC_LOSS_FREQ 0.5 TRAIN.BATCH_SIZE_PER_GPU 4 TRAIN.END_EPOCH 3
    TRAIN.PRETRAIN_STEPS {BORDER} SAVE_FREQ {SAVED_EVERY} PRINT_FREQ 1 TEST.NUM_SAMPLES 16
    TEST.BATCH_SIZE_PER_GPU 2
"""
# Loading in a process of its own in one of the two, so that a signal to the group meets it too.
_DIGITS = "MODEL.IMAGE_SIZE [8,8] PERCENT 0.039 WORKERS 1"
_SCENES = """
    TRAIN.IMAGE_SIZE [32,32] TRAIN.BASE_SIZE 32 TRAIN.FLIP True TRAIN.MULTI_SCALE True
    PERCENT 0.05 WORKERS 0
"""


@dataclass(frozen=True)
class Language:
    """train_transformer.py on a text of a few hundred words; runs lie in folders of ``parent``."""

    name: str = "language"
    validated: tuple[int, ...] = (10, BORDER, 20, 30, STEPS)  # after these steps

    def start(self, parent: Path, to: str) -> list[str]:
        """The command line of a run from its beginning, without the interpreter."""
        data = parent / "text"
        _write_text(data)
        script = ROOT / "DEQ-Sequence/train_transformer.py"
        places = ["--data", data, "--work_dir", parent / "runs", "--name", to]
        return [str(word) for word in (script, *_LANGUAGE.split(), *places)]

    def resume(self, parent: Path, to: str) -> list[str]:
        """The command line that goes on, or starts anew where there is nothing to go on from."""
        return [*self.start(parent, to), "--auto_restart"]

    def folder(self, parent: Path, to: str) -> Path:
        return parent / "runs-ptb" / to


@dataclass(frozen=True)
class Vision:
    """A tool of MDEQ-Vision on data that is made in a moment."""

    name: str
    tool: str
    experiment: str  # dataset/file
    overrides: str
    validated: tuple[int, ...] = (12, BORDER, 24, STEPS)  # epochs of 12 steps

    def start(self, parent: Path, to: str) -> list[str]:
        """The command line of a run from its beginning, without the interpreter."""
        room = ROOT / "MDEQ-Vision"
        file = room / "experiments" / f"{self.experiment}.yaml"
        places = ["--cfg", file, "--modelDir", parent / to]
        overrides = [*_IMAGES.split(), *self.overrides.split()]
        return [str(word) for word in (room / "tools" / self.tool, *places, *overrides)]

    def resume(self, parent: Path, to: str) -> list[str]:
        """The command line that goes on, or starts anew where there is nothing to go on from."""
        return [*self.start(parent, to), "TRAIN.RESUME", "True"]

    def folder(self, parent: Path, to: str) -> Path:
        return parent / to / self.experiment


TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Language(),
        Vision("classification", "cls_train.py", "digits/cls_mdeq_TINY", _DIGITS),
        Vision("segmentation", "seg_train.py", "digit_scenes/seg_mdeq_TINY", _SCENES),
    )
}


def _write_text(folder: Path) -> None:
    """Text in the format of Penn Treebank; the training steps pass it more than once."""
    if folder.exists():
        return
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    folder.mkdir(parents=True)
    for split, n_lines in (("train", 90), ("valid", 40), ("test", 20)):
        lines = (" ".join(rng.choices(words, k=12)) for _ in range(n_lines))
        (folder / f"{split}.txt").write_text("".join(f" {line} \n" for line in lines))


# ---- what to compare ---------------------------------------------------------------------------


def records(folder: Path) -> list[dict]:
    """Everything in the records of a run but speeds and memory."""
    return [
        {name: value for name, value in record.items() if not name.endswith(("_per_s", "_mib"))}
        for record in read_metrics(folder)
    ]


def differences(a, b, name: str = "") -> Iterator[str]:
    """Names of the entries in which two checkpoints differ by as much as a bit."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{name}/{key}" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{name}/{key}")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
        yield name


def differing_records(one: Path, two: Path) -> int:
    """How many records one run has and the other has not, at their places."""
    a, b = records(one), records(two)
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def differing_tensors(one: Path, two: Path) -> list[str]:
    """What differs between the weights and the checkpoints (optimiser, random states, ...)."""
    return [
        f"{name}{entry}"
        for name in (WEIGHTS, CHECKPOINT)
        for entry in differences(load(one / name), load(two / name))
    ]


def assert_same_run(one: Path, two: Path) -> None:
    assert records(one) == records(two)
    assert differing_tensors(one, two) == []


def saved_step(folder: Path) -> int:
    """The step of a run's newest checkpoint that can be read, 0 without one."""
    steps = [0]
    for path in folder.glob("checkpoint*.pt"):
        with contextlib.suppress(InputError):
            steps.append(load(path)["step"])
    return max(steps)


def unreadable(folder: Path) -> list[str]:
    """The weights and checkpoints of a run, old ones too, that cannot be read."""
    found = []
    for path in folder.glob("*.pt"):
        try:
            load(path)
        except InputError as error:
            found.append(str(error))
    return found


def temporary_files(folder: Path) -> set[str]:
    """Files that were being written when their process ended."""
    return {path.name for path in folder.glob(".*")}
