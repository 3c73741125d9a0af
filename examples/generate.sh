#!/usr/bin/env bash
# Generate with trained students swapped in:   bash examples/generate.sh -y out/hyena.pt -W 512
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
exec python generate.py "$@"
