"""What becomes of a run on two machines when one is lost, silent, stopped or full."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, read_metrics
from machines import Launch, Pair, wait_until

PATIENCE = 180.0  # seconds for what takes a few on an idle machine
BORDER, LAST = 150, 300  # steps
TIMES = {"tokens_per_s", "images_per_s", "memory_mib"}

# Everything that draws random numbers or carries state from step to step, logged at each step.
WORDS = f"""
    python train_transformer.py --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --n_layer 2
    --eval_n_layer 2 --init_std 0.2 --tgt_len 8 --mem_len 8 --eval_tgt_len 16 --batch_size 4
    --eval_batch_size 4 --max_eval_steps 4 --f_thres 6 --b_thres 6 --lr 0.01 --dropout 0.1
    --dropatt 0.1 --jac_loss_weight 1 --jac_loss_freq 0.5 --rand_f_thres_delta 2 --batch_chunk 2
    --warmup_step 5 --wnorm --log-interval 1 --eval-interval 20 --save-interval 7
    --max_step {LAST} --pretrain_steps {BORDER}
""".split()
# Four steps an epoch, after each of which it is validated and saved.
SCENES = "experiments/digit_scenes/seg_mdeq_TINY.yaml"
STAGE = "MODEL.EXTRA.FULL_STAGE"
PICTURES = f"""
    python tools/seg_train.py --cfg {SCENES} MODEL.NUM_LAYERS 2 MODEL.DROPOUT 0.1 DEQ.F_THRES 4
    DEQ.B_THRES 4 LOSS.JAC_LOSS_FREQ 0.5 TRAIN.IMAGE_SIZE [32,32] PERCENT 0.0162
    TRAIN.BATCH_SIZE_PER_GPU 2 TEST.NUM_SAMPLES 4 WORKERS 0 PRINT_FREQ 1 SAVE_FREQ 1
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.NUM_BLOCKS [1,1]
    {STAGE}.BIG_KERNELS [0,0] {STAGE}.HEAD_CHANNELS [4,4]
    TRAIN.PRETRAIN_STEPS {BORDER} TRAIN.END_EPOCH {LAST // 4}
""".split()


@dataclass
class Trial:
    """Runs of one training command on a pair of machines, in ``folder``."""

    pair: Pair | None  # for `words` alone
    folder: Path
    pictures: bool = False

    @property
    def program(self) -> str:
        return "seg_train.py" if self.pictures else "train_transformer.py"

    def run_folder(self, name: str) -> Path:
        if self.pictures:
            return self.folder / name / "digit_scenes" / Path(SCENES).stem
        return self.folder / "runs-wt103" / name

    def words(self, name: str) -> list[str]:
        """The command line of the run ``name``."""
        if self.pictures:
            return [*PICTURES, "OUTPUT_DIR", str(self.folder / name)]
        places = ["--data", self._text(), "--work_dir", str(self.folder / "runs")]
        return [*WORDS, *places, "--name", name]

    def start(self, name: str, *more: str, **variables: str) -> list[Launch]:
        """Begin or continue the run ``name`` on both machines, on which nothing else runs then."""
        self.pair.power_off()
        words = [*self.words(name), *more]
        files = self.folder / f"{name}-{time.monotonic_ns()}"
        return self.pair.launch(words, files, **({"AUTO_RESTART": "1"} | variables))

    def reach(self, name: str, step: int, launches: list[Launch]) -> None:
        """Wait until the run has recorded ``step``."""

        def reached() -> bool:
            for launch in launches:
                assert launch.process.poll() is None, launch.err
            return self.last_step(name) >= step

        wait_until(reached, PATIENCE, f"step {step} of {name}")

    def last_step(self, name: str) -> int:
        return max((r["step"] for r in read_metrics(self.run_folder(name))), default=0)

    def finish(self, name: str, *more: str, **variables: str) -> None:
        """Begin or continue a run that nothing happens to any more."""
        for launch in self.start(name, *more, **variables):
            assert launch.ended(PATIENCE) == 0, launch.err

    def said(self, launch: Launch) -> str:
        """The one line of the training command on a machine's error stream."""
        (line,) = (text for text in launch.err.splitlines() if text.startswith(self.program + ":"))
        return line

    def differences(self, one: str, two: str) -> list[str]:
        """Where two runs are not alike bit for bit, apart from times."""
        folders = [self.run_folder(name) for name in (one, two)]
        contents = [
            {
                "records": [
                    {key: value for key, value in record.items() if key not in TIMES}
                    for record in read_metrics(folder)
                ],
                "weights": load(folder / WEIGHTS),
                "checkpoint": load(folder / CHECKPOINT),
            }
            for folder in folders
        ]
        return list(_differences(*contents, "run"))

    def _text(self) -> str:
        """A folder with a text of 60 words, those of low numbers more often."""
        folder = self.folder / "text"
        folder.mkdir(exist_ok=True)
        for split, lines in (("train", 100), ("valid", 20), ("test", 20)):
            numbers = torch.rand(lines, 30, generator=torch.Generator().manual_seed(lines))
            rows = (60 * numbers**2).int().tolist()
            text = "".join(" " + " ".join(f"w{n}" for n in row) + " \n" for row in rows)
            (folder / f"{split}.txt").write_text(text + " <unk> \n")
        return str(folder)


def _differences(a, b, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not torch.equal(a, b):
            yield where
    elif a != b:
        yield f"{where}: {a!r}, {b!r}"


@contextmanager
def little_space(size: int) -> Iterator[None]:
    """What is started meanwhile cannot make a file longer than ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- what happens to a run ---------------------------------------------------------------------


def lose(trial: Trial, name: str, step: int, lost: int) -> None:
    """Let the run reach ``step`` and cut one machine's power: the other has to end."""
    launches = trial.start(name)
    trial.reach(name, step, launches)
    trial.pair.machines[lost].power_off()
    other = launches[1 - lost]
    assert other.ended(PATIENCE) == 1
    assert "lost the other processes (" in trial.said(other)
    assert (trial.last_step(name) < BORDER) == (step < BORDER), "the kill came too late"


def fall_silent(trial: Trial, name: str, step: int, silence, minutes: float) -> list[float]:
    """Let ``silence`` part the machines at ``step``; seconds until each training process said so,
    and until each launch file ended."""
    launches = trial.start(name, DEQ_TIMEOUT=str(minutes))
    trial.reach(name, step, launches)
    began, seconds = time.monotonic(), []
    silence()
    for launch in launches:
        wait_until(lambda launch=launch: trial.program + ":" in launch.err, PATIENCE, "a line")
        seconds.append(time.monotonic() - began)
        assert "lost the other processes (" in trial.said(launch)
    for launch in launches:
        assert launch.ended(PATIENCE) == 1
        seconds.append(time.monotonic() - began)
    return seconds


def stop(trial: Trial, name: str, step: int, send) -> int:
    """Let ``send`` send a signal at ``step``; the step after which all processes stopped."""
    launches = trial.start(name)
    trial.reach(name, step, launches)
    send(launches)
    for launch in launches:
        assert launch.ended(PATIENCE) == 1, launch.err  # torchrun's own code, after any signal
    last = trial.last_step(name)
    for launch in launches:
        assert f"stopped by SIGTERM at step {last} (" in trial.said(launch)
    assert load(trial.run_folder(name) / CHECKPOINT)["step"] == last
    log = (trial.run_folder(name) / LOG).read_text()
    assert log.count(f"stopped by SIGTERM at step {last}: all is saved") == 1
    return last


def terminate(pair: Pair, machine: int):
    """Sends SIGTERM to a machine's training process alone."""
    return lambda launches: pair.machines[machine].signal(signal.SIGTERM, workers=True)
