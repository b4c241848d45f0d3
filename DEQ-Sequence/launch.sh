# Sourced by the launch scripts, which set the array `settings`:
#
#     bash <script>.sh train [flags]    train; flags override the settings
#     bash <script>.sh eval [flags]     evaluate the best weights of that run, or --load WEIGHTS
#
# PYTHON names the interpreter (default: python, that is, the active environment).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
script=$(basename "$0")
mode=${1:-}
shift || true
case $mode in
    train) ;;
    eval) settings+=(--eval) ;;
    *) echo "usage: bash $script train|eval [flags of train_transformer.py]" >&2; exit 2 ;;
esac
exec "${PYTHON:-python}" train_transformer.py "${settings[@]}" --name "${script%.sh}" "$@"
