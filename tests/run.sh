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
# Those that fork their own process go apart and first: of one that has computed much a fork is slow, and torch's threads may
# not outlive it.
forking=(tests/faults tests/processes tests/test_readme.py tests/options/test_command.py tests/distil/test_kept.py)
python -m pytest -n 2 --dist loadfile "${forking[@]}"
python -m pytest -n 2 --dist worksteal tests "${forking[@]/#/--ignore=}" --ignore=tests/comfyui --ignore=tests/ui/test_page.py
