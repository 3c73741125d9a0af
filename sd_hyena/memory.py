"""Peak memory of a device or of this process."""

from __future__ import annotations

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
