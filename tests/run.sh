#!/usr/bin/env bash
# Lint and tests in a virtual environment of their own making; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/venv.sh" requirements.txt requirements-ui.txt requirements-dev.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
if (($#)); then
  exec python -m pytest -n 2 --dist worksteal "$@"
fi
# Those that fork their own process go apart: torch's threads may not outlive a fork of one that has computed much else.
python -m pytest -n 2 --dist loadfile tests/faults tests/processes
python -m pytest -n 2 --dist worksteal --ignore tests/faults --ignore tests/processes --ignore tests/ui/test_page.py
echo "in ComfyUI, and in a browser:"  # apart: the one has modules with names like ours, the other is a single file
python -m pytest tests/comfyui tests/ui/test_page.py -rs -n 2 --dist loadfile
