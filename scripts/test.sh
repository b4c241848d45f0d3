#!/usr/bin/env bash
# Run the tests in .venv: bash scripts/test.sh [pytest arguments], with -m "" for the slow ones too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh requirements-test.txt
# A fixed number: a sum is split between the threads, so the last digits of a loss depend on it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
exec .venv/bin/python -m pytest "$@"
