"""An NVIDIA GPU that PyTorch cannot use: noticed by its driver, for torch itself sees none."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from sd_hyena.processes.ranks import say

DRIVER = Path("/proc/driver/nvidia/gpus")  # Linux; elsewhere nvidia-smi is on the PATH
CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def gpus() -> list[str]:
    """The names of the GPUs that the driver knows."""
    found = [path.read_text().split("Model:")[-1].splitlines()[0].strip() for path in DRIVER.glob("*/information")]
    command = shutil.which("nvidia-smi")
    if found or command is None:
        return found
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    lines = (line.partition(": ")[2] for line in listed.splitlines() if line.startswith("GPU "))
    return [line.split(" (UUID")[0] for line in lines]


@cache
def unused_gpu() -> str:
    """Which GPU torch leaves unused, why, and what to do; empty if there is none, or if it is hidden on purpose."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not (found := gpus()):
        return ""
    if torch.version.cuda is None:
        return f"{found[0]} is here, but torch {torch.__version__} is not built for it: {CUDA_TORCH}"
    return (
        f"{found[0]} is here, but torch for CUDA {torch.version.cuda} cannot use it: its driver is too old, or it is kept "
        "from this process"
    )


@cache
def say_unused_gpu() -> None:
    """Say it, once in a process."""
    if note := unused_gpu():
        say(f"note: {note}")
