#!/usr/bin/env bash
# Check this repository on one GPU, in one command and at most nine minutes:
#
#     bash scripts/gpu_check.sh      all sections; output on the terminal and in gpu_check.md
#     bash scripts/gpu_check.sh --sections digits,steps --minutes 4
#
# Without a GPU the check runs in tiny sizes on the CPU, which tests the check itself. Nothing is
# installed. PYTHON names the interpreter (default: .venv's if there is one, else python3). If that
# interpreter lacks packages, put their wheels on PYTHONPATH: the section "steps" needs only
# PyTorch, numpy, yacs (with PyYAML), tqdm and safetensors. A section that lacks a package says so.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi
rooms=$root:$root/DEQ-Sequence:$root/MDEQ-Vision:$root/scripts/benchmarks
export PYTHONPATH=$rooms${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/gpu_check.py" "$@"
