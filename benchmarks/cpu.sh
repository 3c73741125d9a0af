#!/usr/bin/env bash
# The CPU suites that the documents quote, on one thread, and the documents' tables and plots made from them anew.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python -m benchmarks.check cpu
for suite in cpu core memory image ladder unet; do
  python -m benchmarks "$suite" --device cpu "$@"
done
if lscpu | grep -q avx512_bf16; then # where a core multiplies bfloat16; elsewhere it takes a hundred times as long
  for suite in cpu unet; do
    python -m benchmarks "$suite" --device cpu --dtype bfloat16 "$@"
  done
fi
python -m benchmarks.report.tables
