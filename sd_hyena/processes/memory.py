"""Memory of a device or of this process: its peak, and what to do when it runs out."""

from __future__ import annotations

import gc
import sys

import torch


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, else of this process; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_gib() -> float:
    """What programs can still take of the computer's memory, in GiB; NaN where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = dict(line.split(":", 1) for line in file)["MemAvailable"]
        return int(kib.split()[0]) / 2**20
    except (OSError, LookupError, ValueError):
        return float("nan")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory, on a GPU or (it has no type for that) on the CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said or "out of memory" in said


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
