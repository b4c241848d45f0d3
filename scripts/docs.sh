#!/usr/bin/env bash
# Build the documentation site into docs/_build/html, with warnings as errors, and check its links:
#
#     bash scripts/docs.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh requirements-docs.txt
.venv/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html
.venv/bin/python scripts/check_links.py docs/_build/html
