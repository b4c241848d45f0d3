# shellcheck shell=bash disable=SC2034
# Parse the training command in "$@", written as in the README, with or without its folder. Sourced
# by multinode.sh and slurm.sh, which define `fail`. Leaves the flags in "$@" and sets
#
#     root       the repository
#     room       the folder in it where the command runs; paths in its flags are relative to it
#     training   the command in that folder, without interpreter and flags
#     resume     flags that continue the command's run if there is one, and begin it otherwise
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

case ${1:-} in python | bash) shift ;; esac
name=$(basename "${1:-}")
case $name in
    train_transformer.py) room=DEQ-Sequence training=("$name") resume=(--auto_restart) ;;
    wt103_*.sh) room=DEQ-Sequence training=("$name" train) resume=(--auto_restart) ;;
    cls_train.py | seg_train.py) room=MDEQ-Vision training=("tools/$name") resume=(AUTO_RESUME True) ;;
    *)
        fail "'$name' is none of the training commands:" \
            "train_transformer.py, wt103_*.sh train, cls_train.py, seg_train.py"
        ;;
esac
[ -f "$root/$room/${training[0]}" ] || fail "there is no $room/${training[0]}"
shift
if [[ $name == *.sh ]]; then
    [ "${1:-}" = train ] || fail "'$name ${1:-}' is not training: write $name train [flags]"
    shift
fi
