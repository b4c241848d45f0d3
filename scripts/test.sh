#!/usr/bin/env bash
# Run the tests in .venv: bash scripts/test.sh [pytest arguments]. -m "" runs the slow tests too;
# -n 8 uses eight processes; -n 0 uses this process only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh requirements-test.txt
# A fixed number of threads: sums are split between threads, so it changes the last digits of a
# loss. One thread: on two cores, two processes with one thread are faster than one with two.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without compiled modules, each command that a test starts would compile lib and the models again.
unset PYTHONDONTWRITEBYTECODE
# In the order of the files: xdist's own order leaves files of few tests to the end, and those are
# the ones that take longest, so that one process would wait for the other.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
