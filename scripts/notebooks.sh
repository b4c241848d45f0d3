#!/usr/bin/env bash
# Execute the notebooks of docs/notebooks in place, in .venv:
#
#     bash scripts/notebooks.sh                                  all of them
#     bash scripts/notebooks.sh docs/notebooks/solvers.ipynb     these
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh requirements-docs.txt
exec .venv/bin/python scripts/execute_notebooks.py "$@"
