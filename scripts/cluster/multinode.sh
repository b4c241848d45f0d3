#!/usr/bin/env bash
# Train on several machines: run the same line on each machine, in any order, with the environment
# active.
#
#     MASTER=host0 NODES=2 GPUS=4 bash scripts/cluster/multinode.sh python train_transformer.py --cuda ...
#     MASTER=host0 NODES=2 GPUS=4 bash scripts/cluster/multinode.sh bash wt103_deq_transformer.sh train
#     GPUS=4 RESTARTS=3 bash scripts/cluster/multinode.sh python tools/seg_train.py --cfg experiments/...
#
# Write the command as in the README. It runs in its own folder, DEQ-Sequence or MDEQ-Vision, so
# paths in its flags are relative to that folder.
#
#     GPUS           processes on each machine, one per GPU
#     NODES          machines (1)
#     MASTER, PORT   one of the machines, by a name that all machines know, and a free port on it
#                    (29400)
#     RESTARTS       how often all processes may restart after one was lost (0). They continue
#                    from the last checkpoint. To replace a lost machine (not MASTER), run the same
#                    line on another machine within ten minutes
#     AUTO_RESTART   1: continue the run if there is one, also without RESTARTS
#     DEQ_TIMEOUT    minutes that a process waits for another, such as one on a machine that hangs,
#                    before it ends (15). torchrun itself ends when the kernel gives up the
#                    connection to MASTER: by default on Linux, also after about 15 minutes
#     MAX_TIME       minutes after which the run saves and stops
#     RUN_ID         distinguishes runs that share MASTER and PORT (deq)
#     TORCHRUN       further flags for torchrun
#     PYTHON         the interpreter (python)
#
# OMP_NUM_THREADS defaults to the machine's cores divided by its processes. NCCL and gloo choose
# network interfaces; if they choose wrongly, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
# torchrun replaces this script (exec); at SIGTERM the run saves and stops.
set -euo pipefail

fail() {
    echo "multinode: $*" >&2
    exit 2
}

source "$(dirname "${BASH_SOURCE[0]}")/training_command.sh"

at_least() {
    [[ ${!1} =~ ^(0|[1-9][0-9]*)$ && ${!1} -ge $2 ]] ||
        fail "$1 is '${!1}', but must be a number, $2 or more"
}
: "${GPUS:=}" "${NODES:=1}" "${RESTARTS:=0}" "${PORT:=29400}"
at_least GPUS 1
at_least NODES 1
at_least RESTARTS 0
at_least PORT 1
[[ ${RUN_ID:=deq} =~ ^[A-Za-z0-9._-]+$ ]] ||
    fail "RUN_ID is '$RUN_ID', but must be of letters, digits, '.', '_' and '-'"

flags=(--nnodes="$NODES" --nproc_per_node="$GPUS" --max_restarts="$RESTARTS")
if [ "$NODES" -eq 1 ]; then
    flags+=(--standalone) # chooses a free port
else
    [ -n "${MASTER:-}" ] || fail "$NODES machines need MASTER, the name of one of them"
    flags+=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER:$PORT" --rdzv_id="$RUN_ID")
    # Without this, MASTER publishes the address of its processes only once, and a replacement
    # machine waits for the address forever (torch 2.13).
    [ "$RESTARTS" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# Put MAX_TIME first, so that the command's own flags override it.
[ -z "${MAX_TIME:-}" ] || set -- --max_time "$MAX_TIME" "$@"
if [ "$RESTARTS" -gt 0 ] || [ "${AUTO_RESTART:-0}" != 0 ]; then
    set -- "${resume[@]}" "$@"
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then # torchrun would set 1
    threads=$(($(nproc 2>/dev/null || echo 1) / GPUS))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# exec: a signal to this script must reach torchrun, which forwards it to its processes.
cd "$root/$room"
export TORCHRUN="${flags[*]} ${TORCHRUN:-}"
if [[ ${training[0]} == *.sh ]]; then
    exec bash "${training[@]}" "$@"
fi
read -ra flags <<<"$TORCHRUN"
exec "${PYTHON:-python}" -m torch.distributed.run "${flags[@]}" "${training[@]}" "$@"
