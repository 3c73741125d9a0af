#!/usr/bin/env bash
# Distil a self-attention into a Hyena operator:   bash examples/train.sh -t IN01 -W 512
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
exec python train.py "$@"
