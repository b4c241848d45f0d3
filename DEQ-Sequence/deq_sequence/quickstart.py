"""The quickstart: trains a small DEQ-Transformer on the demo corpus and reports the run."""

import argparse
from pathlib import Path

import torch

from deq_sequence.command import build_model, read_corpus, run_command
from deq_sequence.options import parse
from deq_sequence.text_report import report
from lib.runs.checkpoint import load_weights
from lib.runs.command_line import exit_code
from lib.runs.run_folder import WEIGHTS

# A few minutes on two cores. In this time no other gradient gave a better perplexity. Without the
# Jacobian loss the perplexity is the same, but the spectral radius passes one (docs/words.md).
SETTINGS = """
    --dataset demo --name quickstart
    --d_model 128 --n_head 4 --d_head 32 --d_inner 376 --pre_lnorm --init_std 0.05
    --n_layer 3 --eval_n_layer 3 --adaptive --pretrain_steps 800 --max_step 1500
    --tgt_len 64 --mem_len 64 --eval_tgt_len 64 --batch_size 16
    --grad phantom:steps=3,damping=0.8,form=neumann --f_thres 6
    --jac_loss_weight 2 --jac_loss_freq 0.3
    --optim Muon --lr 0.003 --warmup_step 50 --dropout 0.05
    --log-interval 50 --eval-interval 300 --save-interval 50
"""


def main(argv: list[str], room: Path) -> int:
    """Train with ``SETTINGS``, overridden by ``argv``, in the folder ``room``; then report."""
    return exit_code("quickstart.py", lambda: _train_and_report(argv, room))


def _train_and_report(argv: list[str], room: Path) -> None:
    places = ["--data", str(room / "data" / "demo"), "--work_dir", str(room / "LM-TFM")]
    args = parse([*SETTINGS.split(), *places, *argv])
    folder = run_command(args)
    if folder is not None:
        _report(args, folder)


def _report(args: argparse.Namespace, folder: Path) -> None:
    corpus = read_corpus(args)
    # Generation adds word by word, so every call has another length and would be compiled again.
    args = argparse.Namespace(**vars(args) | {"compile": False})
    model = build_model(args, corpus, torch.device("cpu"))
    load_weights(model, folder / WEIGHTS)
    text = report(args, folder, model, corpus)
    (folder / "report.txt").write_text(text + "\n")
    print(f"\n{text}")
