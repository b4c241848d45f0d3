"""How far do the commands as shipped agree between numbers of processes? Prints a table.

    python tests/scale/shipped_losses.py [words] [digits=0.005,0.001] [scenes=0.001]

Each model is trained by its own command under torchrun with the settings of the quickstart
(optimiser, solvers, tolerances, float32), 25 steps stacked and 25 at equilibrium, at the learning
rates given; without dropout and Jacobian loss, whose random numbers are every process's own. The
same run in one process of two threads shows what rounding alone does to it.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from deq_sequence.quickstart import SETTINGS
from lib.runs.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, BORDER = 50, 25
RATES = {"words": ["0.003"], "digits": ["0.005", "0.001", "0.0001"],
         "scenes": ["0.005", "0.001", "0.0001"]}  # fmt: skip
# Name -> number of processes, threads of each; all are compared with the first.
WAYS = {"1 process": (1, 1), "1, two threads": (1, 2), "2 processes": (2, 1), "4 processes": (4, 1)}
WORDS = f"""
    {SETTINGS} --dropout 0 --jac_loss_freq 0 --max_step {STEPS} --pretrain_steps {BORDER}
    --log-interval 1 --eval-interval 100000 --save-interval 0 --max_eval_steps 4
"""
IMAGES = f"""
    TRAIN.PRETRAIN_STEPS {BORDER} TRAIN.END_EPOCH 2 LOSS.JAC_LOSS_FREQ 0 PRINT_FREQ 1 SAVE_FREQ 0
    TEST.NUM_SAMPLES 40
"""
# PERCENT leaves 25 batches in an epoch.
TOOLS = {
    "digits": ("cls_train", "digits/cls_mdeq_TINY.yaml", "TRAIN.BATCH_SIZE 32 PERCENT 0.64"),
    "scenes": ("seg_train", "digit_scenes/seg_mdeq_TINY.yaml", "TRAIN.BATCH_SIZE 8 PERCENT 0.2"),
}


def command_of(model: str, rate: str, folder: Path) -> list[str]:
    """The command line of a run in ``folder``."""
    if model == "words":
        room = ROOT / "DEQ-Sequence"
        places = ["--data", room / "data/demo", "--work_dir", folder / "run", "--lr", rate]
        return [str(a) for a in (room / "train_transformer.py", *WORDS.split(), *places)]
    room, (tool, cfg, more) = ROOT / "MDEQ-Vision", TOOLS[model]
    argv = [room / f"tools/{tool}.py", "--cfg", room / "experiments" / cfg, "--modelDir", folder]
    return [str(a) for a in (*argv, *IMAGES.split(), *more.split(), "TRAIN.LR", rate)]


def train(model: str, rate: str, processes: int, threads: int) -> dict[str, list[float]]:
    """Losses of the steps and of the validations."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*torchrun, *command_of(model, rate, Path(folder))],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        if done.returncode:
            sys.exit(done.stderr)
        (metrics,) = Path(folder).rglob("metrics.jsonl")
        records = read_metrics(metrics.parent)
    return {kind: [r["loss"] for r in records if r["kind"] == kind] for kind in ("train", "valid")}


def differences(found: list[float], expected: list[float]) -> list[float]:
    """Relative, of each loss."""
    return [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]


def main(argv: list[str]) -> None:
    asked = dict(arg.split("=") if "=" in arg else (arg, "") for arg in argv) or dict.fromkeys(
        RATES
    )
    print("model | rate | compared with 1 process | step 1 | stacked | step 26 | equilibrium "
          "| validation")  # fmt: skip
    for model, rates in asked.items():
        for rate in rates.split(",") if rates else RATES[model]:
            runs = {name: train(model, rate, *way) for name, way in WAYS.items()}
            expected = runs.pop("1 process")
            assert len(expected["train"]) == STEPS
            for name, found in runs.items():
                steps = differences(found["train"], expected["train"])
                row = steps[0], max(steps[:BORDER]), steps[BORDER], max(steps[BORDER:])
                row += (max(differences(found["valid"], expected["valid"])),)
                print(f"{model} | {rate} | {name} | " + " | ".join(f"{v:.1e}" for v in row),
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
