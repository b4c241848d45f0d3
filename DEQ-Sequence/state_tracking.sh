#!/usr/bin/env bash
# Running products in a group, trained on strings of up to 32 elements, evaluated on up to 256.
#     bash state_tracking.sh train|eval --dataset state:GROUP [flags]     GROUP: Z2, S3, A5, ...
settings=(
    --n_head 2 --d_head 32 --d_model 64 --d_inner 256 --init_std 0.1 --local_size 2 --inject own
    --mem_len 0 --tgt_len 32 --batch_size 32 --grow_below 0.1 --eval_batch_size 20
    --f_solver fixed_point_iteration:damping=0.8 --grad phantom:steps=3,damping=1
    --f_thres 8 --f_thres_per_word 1.25 --rand_f_thres_delta 6 --start_std 1
    --lr 0.005 --warmup_step 50 --max_step 600 --clip 1 --log-interval 50 --eval-interval 600
)
one_process=()
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
