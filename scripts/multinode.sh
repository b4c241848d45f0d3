#!/usr/bin/env bash
# Train on several machines: run the same line on each, in any order, with the environment active.
#
#     MASTER=host0 NODES=2 GPUS=4 bash scripts/multinode.sh python train_transformer.py --cuda ...
#     MASTER=host0 NODES=2 GPUS=4 bash scripts/multinode.sh bash wt103_deq_transformer.sh train
#     GPUS=4 RESTARTS=3 bash scripts/multinode.sh python tools/seg_train.py --cfg experiments/...
#
# The command is written as the README shows it. It runs in its own folder, DEQ-Sequence or
# MDEQ-Vision, so paths in its flags are meant from there.
#
#     GPUS           processes on each machine, one per GPU
#     NODES          machines (1)
#     MASTER, PORT   one of the machines, by a name that all know, and a free port of it (29400)
#     RESTARTS       how often all processes start again where one was lost (0). They continue
#                    from the last checkpoint; a machine that is gone can be replaced within ten
#                    minutes, by the same line on another one (not MASTER)
#     AUTO_RESTART   1: continue the run if there is one, also without RESTARTS
#     DEQ_TIMEOUT    minutes that a process waits for another before it ends, as where a machine
#                    falls silent (15). torchrun itself ends when the kernel gives the connection
#                    to MASTER up: by default on Linux, after a quarter of an hour too
#     MAX_TIME       minutes after which the run saves and stops
#     RUN_ID         tells runs apart that share MASTER and PORT (deq)
#     TORCHRUN       further flags of torchrun
#     PYTHON         the interpreter (python)
#
# OMP_NUM_THREADS is the machine's cores shared by its processes, unless it is set. Network
# interfaces are NCCL's and gloo's own choice: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where
# they choose wrongly. SIGTERM to torchrun, which takes this script's place, saves and stops.
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

flags=(--nnodes="$NODES" --nproc_per_node="$GPUS" --max_restarts="$RESTARTS")
if [ "$NODES" -eq 1 ]; then
    flags+=(--standalone) # a free port of its own
else
    [ -n "${MASTER:-}" ] || fail "$NODES machines need MASTER, the name of one of them"
    flags+=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER:$PORT" --rdzv_id="${RUN_ID:-deq}")
    # Else MASTER tells the address of its processes once only, and a machine that replaces another
    # waits for it in vain (torch 2.13).
    [ "$RESTARTS" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# Before the command's own flags, so that those win.
[ -z "${MAX_TIME:-}" ] || set -- --max_time "$MAX_TIME" "$@"
if [ "$RESTARTS" -gt 0 ] || [ "${AUTO_RESTART:-0}" != 0 ]; then
    set -- "${resume[@]}" "$@"
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then # torchrun would say 1
    threads=$(($(nproc 2>/dev/null || echo 1) / GPUS))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# exec: a signal to this script must reach torchrun, which hands it on to its processes.
cd "$root/$room"
export TORCHRUN="${flags[*]} ${TORCHRUN:-}"
if [[ ${training[0]} == *.sh ]]; then
    exec bash "${training[@]}" "$@"
fi
read -ra flags <<<"$TORCHRUN"
exec "${PYTHON:-python}" -m torch.distributed.run "${flags[@]}" "${training[@]}" "$@"
