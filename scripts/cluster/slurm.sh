#!/usr/bin/env bash
# Train on a Slurm cluster, on one node or several. Submit this script in the repository root, with
# the environment active. Flags of sbatch override the #SBATCH lines below:
#
#     sbatch scripts/cluster/slurm.sh python train_transformer.py --cuda --dataset demo --name try
#     sbatch --nodes=2 scripts/cluster/slurm.sh bash wt103_deq_transformer_reg.sh train
#     sbatch --nodes=2 --time=8:00:00 scripts/cluster/slurm.sh python tools/seg_train.py --cfg experiments/...
#
# Write the command as in the README. It runs by scripts/cluster/multinode.sh, whose variables work
# here too; GPUS defaults to the GPUs of the node. The run saves and stops MARGIN minutes (5) before
# the job's time limit, or at SIGTERM. The job then queues itself again, until the run is finished.
# It does not queue itself again if the command failed or made no step. `scancel JOB` ends the job
# for good; the same sbatch line continues the run later.
#
#SBATCH --job-name=deq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to the processes of srun (not to this shell), in case MAX_TIME did not stop them.
#SBATCH --signal=TERM@150
set -euo pipefail

fail() {
    echo "slurm: $*" >&2
    exit 2
}

# Bash would run code in a variable that it takes for a number, so each is checked first.
[[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]] || fail "submit this: sbatch [flags of sbatch] scripts/cluster/slurm.sh COMMAND"
# Slurm runs a copy of this file, so find the other files from the working directory.
[ -f scripts/cluster/training_command.sh ] || fail "$PWD is not the repository: submit there, or add --chdir"
command=("$@")
source scripts/cluster/training_command.sh

# Print the whole minutes until the job's time limit; nothing if there is no limit.
minutes_left() {
    local left
    left=$(squeue -h -j "$SLURM_JOB_ID" -o %L) # [[days-]hours:]minutes:seconds
    [[ $left =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):[0-9]+$ ]] || return 0
    local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[4]:-0} minutes=${BASH_REMATCH[5]}
    echo $((10#$days * 1440 + 10#$hours * 60 + 10#$minutes))
}

progress() {
    (cd "$room" && "${PYTHON:-python}" "$root/scripts/cluster/run_progress.py" "${training[@]}" "$@")
}

export NODES=$SLURM_JOB_NUM_NODES GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-}}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER PORT=${PORT:-$((20000 + 10#$SLURM_JOB_ID % 10000))} # jobs may share a node
export RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} AUTO_RESTART=1
# Seconds between SIGTERM and SIGKILL: torchrun's 30 may be too few to end a step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

before=$(progress "$@")
minutes=$(minutes_left)
if [ -z "${MAX_TIME:-}" ] && [ -n "$minutes" ]; then
    [[ ${MARGIN:=5} =~ ^[0-9]{1,9}(\.[0-9]{1,9})?$ ]] ||
        fail "MARGIN is '$MARGIN', but must be a number of minutes, such as 5 or 2.5"
    MAX_TIME=$(LC_ALL=C awk -v minutes="$minutes" -v margin="$MARGIN" \
        'BEGIN { if (minutes > margin) printf "%.12g", minutes - margin }')
    [ -n "$MAX_TIME" ] || fail "MARGIN is $MARGIN minutes, but the job has only $minutes left"
    export MAX_TIME
fi

# --kill-on-bad-exit=0 --wait=180: when the processes of a node end, the other nodes have time to
# save. --cpus-per-task: since Slurm 22.05, srun does not take it from the job.
code=0
srun --nodes="$NODES" --ntasks="$NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --export=ALL --kill-on-bad-exit=0 --wait=180 \
    bash scripts/cluster/multinode.sh "${command[@]}" || code=$?

# The exit code does not distinguish a stopped from a failed run: torchrun exits with 1 after any
# signal.
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
