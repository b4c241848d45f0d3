# shellcheck shell=bash disable=SC2154
# Sourced by the launch scripts, which set the arrays `settings` and `one_process`:
#
#     bash <script>.sh train [flags]    train; flags override the settings
#     bash <script>.sh eval [flags]     evaluate the best weights of that run, or --load WEIGHTS
#
# A run is evaluated with the settings that it was trained with, which its folder holds; only weights
# given by --load have those of the script.
#
# One process uses all GPUs (DataParallel, the settings of `one_process`), unless one of these
# variables starts a process per GPU by torchrun:
#
#     NPROC=4 bash <script>.sh train                     4 processes on this machine
#     TORCHRUN="--nnodes=2 ..." bash <script>.sh train   any flags of torchrun, without quotes in it
#
# PYTHON names the interpreter (default: python, that is, the active environment), also of torchrun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
script=$(basename "$0")
mode=${1:-}
shift || true
case $mode in
    train) ;;
    eval)
        [[ " $*" == *" --load"* ]] || settings=()
        settings+=(--eval) ;;
    *) echo "usage: bash $script train|eval [flags of train_transformer.py]" >&2; exit 2 ;;
esac
launcher=("${PYTHON:-python}")
if [ -n "${TORCHRUN:=${NPROC:+--standalone --nproc_per_node=$NPROC}}" ]; then
    read -ra flags <<<"$TORCHRUN"
    launcher+=(-m torch.distributed.run "${flags[@]}")
else
    settings+=("${one_process[@]}")
fi
exec "${launcher[@]}" train_transformer.py "${settings[@]}" --name "${script%.sh}" "$@"
