#!/usr/bin/env bash
# Set up .venv and train small models, with no data to download:
#
#     bash scripts/quickstart.sh                 bits, then words, then images
#     bash scripts/quickstart.sh --bits   [...]  an equilibrium on prefix sums; flags of its example
#     bash scripts/quickstart.sh --words  [...]  a language model; flags of train_transformer.py
#     bash scripts/quickstart.sh --images [...]  two image models; KEY VALUE overrides for both
#
# --restart, as the last flag, continues runs of words and images that were cut off.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

part=all
case "${1:-}" in
    --bits | --words | --images) part=${1#--} && shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    "" | --restart) ;;
    *) echo "quickstart: '$1' needs --bits, --words or --images before it" >&2 && exit 2 ;;
esac

bash "$root/scripts/setup_env.sh" requirements.txt
python=$root/.venv/bin/python

if [ "$part" = bits ] || [ "$part$*" = all ]; then  # a --restart does not repeat it
    "$python" "$root/examples/prefix_sums.py" "$@"
fi
if [ "$part" = words ] || [ "$part" = all ]; then
    "$python" "$root/DEQ-Sequence/quickstart.py" "$@"
fi
if [ "$part" = images ] || [ "$part" = all ]; then
    "$python" "$root/MDEQ-Vision/quickstart.py" digits "$@"
    "$python" "$root/MDEQ-Vision/quickstart.py" scenes "$@"
fi
