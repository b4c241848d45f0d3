#!/usr/bin/env bash
# DEQ-Transformer with Jacobian regularisation on WikiText-103 (arXiv 2106.14342), on 4 GPUs.
#     bash wt103_deq_transformer_reg.sh train|eval [flags]
settings=(
    --cuda
    --data ./data/wikitext-103/ --dataset wt103
    --adaptive --div_val 4
    --n_layer 2 --eval_n_layer 24 --d_embed 700 --d_model 700 --n_head 10 --d_head 70 --d_inner 48000
    --wnorm --dropout 0.06 --dropatt 0.01
    --optim Adam --lr 0.00025 --warmup_step 16000 --max_step 300000 --pretrain_steps 32000 --eval-interval 5000
    --batch_size 56 --tgt_len 150 --mem_len 300 --eval_tgt_len 150
    --f_solver anderson --b_solver broyden --stop_mode rel --f_thres 12 --b_thres 13 --rand_f_thres_delta 2
    --jac_loss_weight 1.9 --jac_loss_freq 0.35 --jac_incremental 35000
)
one_process=(--multi_gpu --gpu0_bsz 14)  # torchrun shares the batch evenly instead
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
