#!/usr/bin/env bash
# The main job, end to end, on the small Stable Diffusion that ships: train, watch, swap, generate. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
exec python -m sd_hyena.demo "$@"
