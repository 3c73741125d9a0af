#!/usr/bin/env bash
# The page, in a virtual environment of its own making:   bash examples/ui.sh   then open http://127.0.0.1:7860
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt requirements-ui.txt
exec python -m sd_hyena.ui "$@"
