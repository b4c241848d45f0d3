#!/usr/bin/env bash
# Running products in a group, trained on strings of up to 32 elements, evaluated on up to 256.
#     bash state_tracking.sh train|eval --dataset state:S3 [flags]                   S3, or Z2 (parity)
#     bash state_tracking.sh train|eval --dataset state:A5 --max_step 3500 [flags]   60 elements
settings=(
    --n_head 2 --d_head 32 --d_model 64 --d_inner 512 --init_std 0.1 --local_size 2 --inject own
    --mem_len 0 --tgt_len 32 --batch_size 32 --grow_below 0.05 --eval_batch_size 20
    --f_solver fixed_point_iteration --grad phantom:steps=3,damping=1
    --f_thres 4 --f_thres_per_word 1 --rand_f_thres_delta 2
    --lr 0.005 --warmup_step 50 --max_step 400 --clip 1 --log-interval 50
)
one_process=()
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
