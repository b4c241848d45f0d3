#!/usr/bin/env bash
# Set up .venv and train small models, with no data to download:
#
#     bash scripts/quickstart.sh                 words, then images
#     bash scripts/quickstart.sh --words  [...]  a language model; flags of train_transformer.py
#     bash scripts/quickstart.sh --images [...]  two image models; KEY VALUE overrides for both
#
# --restart, as the last flag, continues runs that were cut off.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

part=all
case "${1:-}" in
    --words | --images) part=${1#--} && shift ;;
    "" | --restart) ;;
    *) echo "quickstart: '$1' needs --words or --images before it" >&2 && exit 2 ;;
esac

bash "$root/scripts/setup_env.sh" requirements.txt
python=$root/.venv/bin/python

if [ "$part" != images ]; then
    "$python" "$root/DEQ-Sequence/quickstart.py" "$@"
fi
if [ "$part" != words ]; then
    "$python" "$root/MDEQ-Vision/quickstart.py" digits "$@"
    "$python" "$root/MDEQ-Vision/quickstart.py" scenes "$@"
fi
