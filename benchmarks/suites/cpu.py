"""The block of IN01 on one thread in float32, and how its time grows: the exponent of the tokens, 2 for attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness.contest import contest
from benchmarks.harness.layouts import sites
from benchmarks.harness.methods import ATTENTION, UNTRAINED, methods
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from benchmarks.suites import block

OURS = ("hyena2d", "hyena2d, 64", "hyena2d, 256", "clusters, 256")
OURS += ("hyena2d, learned landmarks", "hyena2d rank 4", "hyena2d full")
PEERS = (
    "linear attention",
    "safari, published",
    "hypertile 256 px",
    "Hyena-SE, raster",
    "Hyena-SE, plane",
    "pointwise",
)
SHOWN_METHODS = (ATTENTION, *OURS, *UNTRAINED, *PEERS)


def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Every method at 256 ... 1024 px; each line at the largest size says its exponent since the one before."""
    site, before = sites()["IN01"], {}
    sides = (256, 512) if setting.quick else (256, 512, 768, 1024)
    for side in sides:
        size = site.size(side // 8, side // 8)
        x = block.tokens_of(setting, 1, size[0] * size[1], site.channels)
        blank = Row(setting, "cpu", (side, side), "", site=site.short)
        least = block.least_bytes(*x.shape, x.element_size())
        budget = 4.0 if setting.quick else 20.0
        found = contest(methods(site, size, setting, SHOWN_METHODS), x, blank, ceilings, least, budget, longest=60.0)
        for row in found:
            now = row.compared.seconds.median if row.compared else None
            if now and row.method in before:
                tokens, then = before[row.method]
                row = replace(
                    row, note=f"time grows as tokens^{math.log(now / then) / math.log(row.tokens / tokens):.2f}"
                )
            if now:
                before[row.method] = row.tokens, now
            yield row
