#!/usr/bin/env bash
# What one GPU makes of this repository, in one command and at most nine minutes:
#
#     bash scripts/gpu_check.sh                                 all, to the terminal and gpu_check.md
#     bash scripts/gpu_check.sh --sections digits,steps --minutes 4
#
# Without a GPU it runs in tiny sizes on the CPU: that tells whether the check itself works.
# Nothing is installed. PYTHON names the interpreter (default: that of .venv if it is there, else
# python3). Of what it lacks, put the wheels on PYTHONPATH (yacs is all that the steps need beside
# PyTorch and numpy); sections that cannot be run say so.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi
rooms=$root:$root/DEQ-Sequence:$root/MDEQ-Vision:$root/scripts
export PYTHONPATH=$rooms${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/gpu_check.py" "$@"
