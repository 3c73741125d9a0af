#!/usr/bin/env bash
# Lint and the daily suite in a virtual environment of their own making; arguments go to pytest. What a neighbour shows too, and what
# needs ComfyUI or a browser, is the gate's: .ci/run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/venv.sh" requirements.txt requirements-ui.txt requirements-dev.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
(($#)) || set -- --ignore=tests/comfyui --ignore=tests/ui/test_page.py
python -m pytest -n 2 --dist worksteal "$@"
