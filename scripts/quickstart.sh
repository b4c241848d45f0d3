#!/usr/bin/env bash
# Set up .venv and train a small model: bash scripts/quickstart.sh [arguments of quickstart.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup_env.sh" requirements.txt

# ---- words -----------------------------------------------------------------------------------
"$root/.venv/bin/python" "$root/DEQ-Sequence/quickstart.py" "$@"
