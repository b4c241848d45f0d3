"""A small language model and text for it; shared by the tests of the model."""

from pathlib import Path

import torch

from deq_sequence import DEQTransformerLM, command

# Flags of a training run of four steps.
TINY_RUN = """
    --dataset demo --name tiny --d_model 8 --n_head 1 --d_head 8 --d_inner 8 --init_std 0.2
    --adaptive --n_layer 2 --eval_n_layer 2 --pretrain_steps 2 --max_step 4 --grad jfb --f_thres 3
    --tgt_len 8 --mem_len 8 --eval_tgt_len 8 --batch_size 2 --eval_batch_size 2 --max_eval_steps 1
"""

SMALL = {
    "n_token": 17,
    "n_layer": 2,
    "eval_n_layer": 4,
    "n_head": 2,
    "d_model": 8,
    "d_head": 4,
    "d_inner": 12,
    "dropout": 0.0,
    "dropatt": 0.0,
    "tgt_len": 5,
    "mem_len": 7,
    "cutoffs": [4, 9],
    "div_val": 2,
    "tie_projs": [False, True, True],
    "pretrain_steps": 10,
}


def build(seed=0, **changes) -> DEQTransformerLM:
    torch.manual_seed(seed)
    return DEQTransformerLM(**{**SMALL, **changes})


def words(length=5, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(17, (length + 1, batch), generator=generator)
    return both[:-1].clone(), both[1:].clone()


VOCABULARIES = {
    "no cutoffs": {"cutoffs": [], "div_val": 1, "tie_projs": [False]},
    "cutoffs": {"div_val": 1},
    "narrow clusters": {},
    "projected": {"div_val": 1, "d_embed": 6},
    "untied": {"tie_weights": False, "tie_projs": []},
}

STACKED, EQUILIBRIUM = 0, -1  # values of train_step


def trained_on_states(place: Path) -> Path:
    """The folder of a run of one step on strings of Z2, with thresholds that grow with them."""
    flags = """
        --dataset state:Z2 --d_model 8 --n_head 1 --d_head 8 --d_inner 8 --local_size 2 --mem_len 0
        --tgt_len 3 --batch_size 2 --max_step 1 --f_thres 2 --f_thres_per_word 0.34
        --eval_batch_size 2 --max_eval_steps 1 --num_threads 1 --name run
    """.split()
    assert command.main([*flags, "--work_dir", str(place / "runs")]) == 0
    return place / "runs-state-Z2" / "run"
