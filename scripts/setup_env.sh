#!/usr/bin/env bash
# Make the environment .venv in the repository root ready for the other scripts:
#
#     bash scripts/setup_env.sh requirements.txt
#
# The script installs if the requirements, setup.py or pyproject.toml have changed since the last complete install.
# It always uses this .venv, never an active environment. To work in your own environment, run
# `pip install -r requirements.txt` there, and call the Python commands directly.
# PYTHON names the interpreter of a new .venv (default: python3); delete .venv to change it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup_env: $1" >&2
    exit 2
}

requirements=${1:-}
[ -f "$requirements" ] || fail "no requirements file '$requirements': try requirements.txt"

# The checksum includes the folder: .venv and the editable install contain its absolute path.
wanted=$({ pwd -P; cat requirements*.txt setup.py pyproject.toml; } | cksum)
if [ "$(cat ".venv/.installed-$requirements" 2>/dev/null)" = "$wanted" ]; then
    echo "setup_env: .venv is up to date with $requirements"
    exit
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "'$python' is not Python 3.11 or newer: name one, as in PYTHON=/path/to/python3"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "'$python' cannot make environments: install its venv package (python3-venv on Debian)"
    { "$python" -m venv .venv && .venv/bin/python -m pip --version >/dev/null; } ||
        fail "cannot make .venv: delete that folder and try again"
fi

echo "setup_env: installing $requirements into .venv (the first time takes minutes)"
# Delete the stamps before and write them after the install: the next run repairs one cut off.
rm -f .venv/.installed-*
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
for file in "$requirements" $(sed -n 's/^-r //p' "$requirements"); do
    echo "$wanted" >".venv/.installed-$file"
done
echo "setup_env: .venv is ready"
