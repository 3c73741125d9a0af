"""How many landmarks a head gets where nobody says: the most that still make the site cheaper than its attention."""

from __future__ import annotations

from functools import lru_cache

from sd_hyena.cost.operations import attention_flops, folded_flops
from sd_hyena.sites import Site
from sd_hyena.students.student import Size
from sd_hyena.students.untrained import untrained_spec

COUNTS = (256, 128, 64)


def cheaper(site: Site, size: Size, count: int) -> bool:
    """Whether a site on a grid (H, W) takes fewer operations by way of so many landmarks than with its attention."""
    return _operations(Site("", "", site.channels, site.heads, 0), size, count) < attention_flops(site, size)


def count_for(site: Site, size: Size) -> int | None:
    """For a site on a grid (H, W); None where attention itself is cheaper than any."""
    return next((count for count in COUNTS if cheaper(site, size, count)), None)


@lru_cache(maxsize=1024)
def _operations(site: Site, size: Size, count: int) -> int:
    return folded_flops(untrained_spec(site, count), size)
