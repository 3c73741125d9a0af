"""Peak memory of a block, above its weights and input, its result included, each method in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness.contest import EFFICIENCY, error_of
from benchmarks.harness.gate import verdict
from benchmarks.harness.layouts import sites
from benchmarks.harness.methods import ATTENTION, methods
from benchmarks.harness.peak import blocks_mapped_one_by_one, gpu_peaks, in_its_own_process, peak_mib
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from benchmarks.suites import block
from sd_hyena.cost.operations import attention_flops

MEASURED = (ATTENTION, "sdpa by heads", "hyena2d", "hyena2d, 256", "hyena2d full")
MEASURED += tuple(f"clusters, {m}, untrained" for m in (64, 256, 512))
MEASURED = (*MEASURED, "linear attention", "safari, published", "hypertile 256 px")
CHECKED, LONGEST = 512, 40.0  # pixels a side, seconds of a call


def _error(setting: Setting, name: str, answer) -> None:
    torch.set_num_threads(1)
    site = sites()["IN01"]
    size = site.size(CHECKED // 8, CHECKED // 8)
    [method] = methods(site, size, setting, (name,))
    answer.put(error_of(method, block.tokens_of(setting, 1, size[0] * size[1], site.channels)))


def _peak(setting: Setting, name: str, side: int, answer) -> None:
    torch.set_num_threads(1)
    site = sites()["IN01"]
    size = site.size(side // 8, side // 8)
    [method] = methods(site, size, setting, (name,))
    x = block.tokens_of(setting, 1, size[0] * size[1], site.channels)
    with torch.no_grad():
        method.call(x)  # what a first call loads for good is no peak of the next
        if setting.on_gpu:
            allocated, reserved = gpu_peaks(lambda: method.call(x), setting.device)
        else:
            (_, _, allocated), reserved = peak_mib(lambda: method.call(x)), None
    answer.put((allocated, reserved))


def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """IN01 with one sample; checked at one size, where a reference in float64 is cheap."""
    site = sites()["IN01"]
    errors = {name: in_its_own_process(_error, setting, name) for name in MEASURED}
    for side in (512,) if setting.quick else (512, 1024, 2048, 4096):
        size = site.size(side // 8, side // 8)
        slow = attention_flops(site, size) / (EFFICIENCY * ceilings.matmul)
        for name, error in errors.items():
            row = Row(setting, "memory", (side, side), name, site=site.short, tokens=size[0] * size[1], error=error)
            row = replace(row, status=verdict(error, setting.dtype))
            if name in (ATTENTION, "sdpa by heads") and slow > LONGEST:
                row = replace(row, status=f"skipped: about {slow:.0f} s a call")
            if row.status == "ok":
                with blocks_mapped_one_by_one():
                    allocated, reserved = in_its_own_process(_peak, setting, name, side)
                unit = row.tokens * site.channels * setting.dtype.itemsize / 2**20
                row = replace(row, allocated=allocated, reserved=reserved, note=f"{allocated / unit:.1f} units")
            yield row
