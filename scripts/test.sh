#!/usr/bin/env bash
# Run the tests in .venv: bash scripts/test.sh [pytest arguments], with -m "" for the slow ones too,
# -n 8 for eight processes, -n 0 for none beside this one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh requirements-test.txt
# A fixed number: a sum is split between the threads, so the last digits of a loss depend on it.
# One, as two processes of one thread do more on two cores than one of two.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
