"""Comparing how long things take on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sd_hyena.student import Projections, Size


def wait_for(device: torch.device) -> None:
    """Return when everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> tuple[float, ...]:
    """Median seconds of each call, taken in turn after one warm-up, so that a drifting clock meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):
        for call, kept in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            wait_for(device)
            if round_:
                kept.append(time.perf_counter() - started)
    return tuple(sorted(kept)[len(kept) // 2] for kept in times)


@torch.no_grad()
def block_seconds(attention: nn.Module, student: nn.Module, size: Size, batch: int, rounds: int) -> tuple[float, ...]:
    """Median seconds of a site's attention and of its student, on random tokens of a grid (H, W)."""
    p = next(attention.parameters())
    x = torch.randn(batch, size[0] * size[1], attention.to_q.in_features, device=p.device, dtype=p.dtype)
    calls = (lambda: attention(x), lambda: student(x, Projections.of(attention), size))
    return interleaved_medians(calls, rounds, p.device)
