#!/usr/bin/env bash
# Everything worth a GPU, in ten minutes, on a machine with PyTorch and nothing else of ours:
#
#   bash benchmarks/gpu.sh [-w WHEELS] [-o FOLDER] [-d DEVICE] [--quick]
#
# WHEELS holds what the machine lacks (pip download --no-deps diffusers==0.42.1 jsonargparse importlib_metadata).
# What everything computes is checked first; tables, circumstances and plots go into FOLDER, benchmarks/results by default.
# On a GPU a suite that takes too long is stopped and leaves what it has. Without one: bash benchmarks/gpu.sh -d cpu --quick
set -euo pipefail
cd "$(dirname "$0")/.."
wheels="" out=benchmarks/results device=cuda quick=()
while (($#)); do
  case $1 in
    -w) wheels=$2; shift 2 ;;
    -o) out=$2; shift 2 ;;
    -d) device=$2; shift 2 ;;
    --quick) quick=(--quick); shift ;;
    *) echo "error: unknown argument $1" >&2; exit 2 ;;
  esac
done
if [[ -n $wheels ]]; then
  [[ -d $wheels ]] || { echo "error: -w $wheels is no folder" >&2; exit 2; }
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  python -m pip install --quiet --no-index --no-deps --target "$packages" "$wheels"/*.whl
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$out"
python -m benchmarks.check "$device" 2>&1 | tee "$out/check_$device.txt"
suite() { # seconds, name
  echo "== $2"
  limit=(); [[ $device == cuda* ]] && limit=(timeout --kill-after=60 "$1")
  "${limit[@]}" python -m benchmarks "$2" --device "$device" --out "$out" "${quick[@]}" || echo "$2 ended with $?"
}
suite 70 core
suite 190 block
suite 110 unet
suite 130 ladder
suite 40 image
