"""Correctness before speed: what does not compute the right thing has no time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def relative_error(y: Tensor, reference: Tensor) -> float:
    """`|y - reference| / |reference|` in float64; infinite if y holds what is no number, or has another shape."""
    if y.shape != reference.shape or not bool(torch.isfinite(y).all()):
        return math.inf
    difference = y.to(reference) - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-300))


def verdict(error: float, dtype: torch.dtype) -> str:
    """`ok`, or what is wrong; NaN is wrong."""
    return "ok" if error <= TOLERANCE[dtype] else f"failed: error {error:.1e}"
