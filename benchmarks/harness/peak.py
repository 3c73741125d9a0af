"""Peak memory of one call, above what was held before, its result and mapped files included; and a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def gpu_peaks(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """MiB that a call allocates on a GPU at its peak above what was held before, its result included; and reserves in all."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20, torch.cuda.max_memory_reserved(device) / 2**20


def peak_mib(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds and MiB: of the GPU's allocator if there is one, else resident (Linux only)."""
    cuda = torch.cuda.is_available()

    def held(what: str) -> float:
        if cuda:
            return (torch.cuda.memory_allocated() if what == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
        return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before, started = held("VmRSS"), time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, held("VmHWM") - before


def blocks_mapped_one_by_one() -> AbstractContextManager:
    """Processes started inside give freed memory back at once (glibc), so that resident is what is in use."""
    return mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"})  # bytes


def in_its_own_process(work: Callable[..., None], *arguments: Any) -> Any:
    """What `work(*arguments, answer)` puts into `answer`, in a fresh process. Exits if it fails."""
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.SimpleQueue()
    process = spawn.Process(target=work, args=(*arguments, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__}{arguments} ended with {process.exitcode}")
    return answer.get()
