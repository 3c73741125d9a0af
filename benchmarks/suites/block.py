"""Attention against every operator and peer, at the shapes of Stable Diffusion 1.5's sites, projections included."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness.contest import contest
from benchmarks.harness.layouts import sites
from benchmarks.harness.methods import methods
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting

OF_EACH_SHAPE = ("IN01", "IN04", "IN07", "M00")  # the other sites have the shape of one of these
LONGEST = 8.0  # seconds a call may take


def tokens_of(setting: Setting, batch: int, length: int, channels: int) -> torch.Tensor:
    """Random tokens (B, L, D), the same ones every time."""
    source = torch.Generator(setting.device).manual_seed(0)
    given = {"device": setting.device, "dtype": setting.dtype, "generator": source}
    return torch.randn(batch, length, channels, **given)


def least_bytes(batch: int, length: int, channels: int, itemsize: int) -> int:
    """What a block must move at least: ten elements for each of its tokens' channels, and four matrices."""
    return itemsize * (10 * batch * length * channels + 4 * channels**2)


def sides(setting: Setting) -> list[int]:
    """Pixels a side."""
    if setting.on_gpu:
        return [512, 1024, 2048, 4096] if setting.quick else [256, 512, 768, 1024, 1536, 2048, 4096, 8192]
    return [256, 512] if setting.quick else [256, 512, 768, 1024]


def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Every site's shape at every size; one image with guidance on a GPU, one sample on a CPU."""
    known, batch = sites(), 2 if setting.on_gpu else 1
    budget = 4.0 if setting.quick else 15.0
    for side in sides(setting):  # outermost, so that a run that is stopped has all sites at the sizes it reached
        for short in OF_EACH_SHAPE[:1] if setting.quick and not setting.on_gpu else OF_EACH_SHAPE:
            site = known[short]
            size = site.size(side // 8, side // 8)
            x = tokens_of(setting, batch, size[0] * size[1], site.channels)
            blank = Row(setting, "block", (side, side), "", site=short)
            least = least_bytes(*x.shape, x.element_size())
            yield from contest(methods(site, size, setting), x, blank, ceilings, least, budget, LONGEST)
