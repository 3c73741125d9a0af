"""Comparing how long things take on a machine that others use too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sd_hyena.students.student import Projections, Size


def wait_for(device: torch.device) -> None:
    """Return when everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes: on a GPU between two events in its stream, on one thread of a CPU by that thread's own
    time, which other programs do not prolong, else by the clock."""
    wait_for(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        wait_for(device)
        return begin.elapsed_time(end) / 1e3
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    wait_for(device)
    return clock() - started


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, shuffle: random.Random | None = None
) -> list[list[float]]:
    """Seconds of each call in each round, so that a drifting clock meets all alike.

    A round takes every call once, in turn, or with `shuffle` in an order drawn anew. Warming up is the caller's.
    """
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        if shuffle is not None:
            shuffle.shuffle(order)
        for i in order:
            times[i].append(seconds(calls[i], device))
    return times


def interleaved_medians(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> tuple[float, ...]:
    """Median seconds of each call, taken in turn after one warm-up."""
    interleaved(calls, 1, device)
    return tuple(sorted(times)[len(times) // 2] for times in interleaved(calls, rounds, device))


@torch.no_grad()
def block_seconds(attention: nn.Module, student: nn.Module, size: Size, batch: int, rounds: int) -> tuple[float, ...]:
    """Median seconds of a site's attention and of its student, on random tokens of a grid (H, W)."""
    p = next(attention.parameters())
    x = torch.randn(batch, size[0] * size[1], attention.to_q.in_features, device=p.device, dtype=p.dtype)
    calls = (lambda: attention(x), lambda: student(x, Projections.of(attention), size))
    return interleaved_medians(calls, rounds, p.device)
