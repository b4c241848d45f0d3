#!/usr/bin/env bash
# Train on a Slurm cluster, on one node or several. Submit it in the repository root, with the
# environment active; flags of sbatch override the lines below:
#
#     sbatch scripts/slurm.sh python train_transformer.py --cuda --dataset demo --name try
#     sbatch --nodes=2 scripts/slurm.sh bash wt103_deq_transformer_reg.sh train
#     sbatch --nodes=2 --time=8:00:00 scripts/slurm.sh python tools/seg_train.py --cfg experiments/...
#
# The command is written as the README shows it, and runs as scripts/multinode.sh says, whose
# variables hold here too; GPUS are those of the node unless it is set. The run saves and stops
# MARGIN minutes (5) before the job's time limit, or at SIGTERM, and the job queues itself again
# until the run has reached its end. It does not where the command failed or came no step further,
# and `scancel JOB` ends it for good; the same sbatch line continues the run later.
#
#SBATCH --job-name=deq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To the processes of srun, not to this shell: should MAX_TIME not have stopped them.
#SBATCH --signal=TERM@150
set -euo pipefail

fail() {
    echo "slurm: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit this: sbatch [flags of sbatch] scripts/slurm.sh COMMAND"
# Slurm runs a copy of this file, so only the working directory leads to the others.
[ -f scripts/training_command.sh ] || fail "$PWD is not the repository: submit there, or add --chdir"
command=("$@")
source scripts/training_command.sh

# Whole minutes until the job's time limit; nothing where it has none.
minutes_left() {
    local left
    left=$(squeue -h -j "$SLURM_JOB_ID" -o %L) # [[days-]hours:]minutes:seconds
    [[ $left =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):[0-9]+$ ]] || return 0
    local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[4]:-0} minutes=${BASH_REMATCH[5]}
    echo $((10#$days * 1440 + 10#$hours * 60 + 10#$minutes))
}

progress() {
    (cd "$room" && "${PYTHON:-python}" "$root/scripts/run_progress.py" "${training[@]}" "$@")
}

export NODES=$SLURM_JOB_NUM_NODES GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-}}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs may share a node
export RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} AUTO_RESTART=1
# Between SIGTERM and SIGKILL, in seconds: torchrun's 30 may be too short to end a step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

before=$(progress "$@")
minutes=$(minutes_left)
if [ -z "${MAX_TIME:-}" ] && [ -n "$minutes" ]; then
    export MAX_TIME=$((minutes - ${MARGIN:=5}))
    [ "$MAX_TIME" -gt 0 ] || fail "MARGIN is $MARGIN minutes, but the job has only $minutes left"
fi

# A node whose processes have ended, well or badly, leaves the others time to save. Since Slurm
# 22.05, srun does not take --cpus-per-task from the job.
code=0
srun --nodes="$NODES" --ntasks="$NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --export=ALL --kill-on-bad-exit=0 --wait=180 \
    bash scripts/multinode.sh "${command[@]}" || code=$?

# The exit code does not tell a stopped run from a broken one: torchrun's is 1 after any signal.
after=$(progress "$@")
echo "slurm: before: $before, after: $after, exit code $code"
case $after in
    finished*) exit "$code" ;;
    stopped*)
        if [ "$after" != "$before" ]; then
            echo "slurm: queued again to continue"
            exec scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
echo "slurm: not queued again: the command failed, or came no step further" >&2
exit "$((code > 0 ? code : 1))"
