"""Rectangles of a canvas that are predicted, how much each of their cells counts, and how they add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd_hyena.large.regions import Region
from sd_hyena.large.tiling import Rect, Size, add, weights


class View(NamedTuple):
    """A rectangle to predict, how much each of its cells counts (h, w), and the region that it is, if one."""

    rect: Rect
    weight: Tensor
    region: Region | None = None

    @property
    def adapters(self) -> tuple[str, ...] | None:
        return self.region.adapters if self.region else None


def regional_views(regions: Sequence[Region], kind: str, overlap: int, canvas: Size) -> tuple[list[View], list[View]]:
    """Of regions on a canvas (H, W): those in the background, with weights of this kind, and those in the foreground."""
    background, foreground = [], []
    for region in regions:
        rect = region.rect(canvas)
        opacity = region.opacity(canvas)
        if region.blend_mode == "foreground":
            foreground.append(View(rect, opacity, region))
        else:
            weight = opacity * weights(kind, rect.height, rect.width, overlap)
            background.append(View(rect, weight, region))
    return background, foreground


def total_of(views: Sequence[View], canvas: Size) -> Tensor:
    """How much each cell counts in all views together, (H, W)."""
    total = torch.zeros(canvas)
    for view in views:
        add(total, view.rect, view.weight)
    return total


def opacity_of(foreground: Sequence[View], canvas: Size) -> Tensor:
    """Of all foreground regions, one over the other, (H, W)."""
    transparency = torch.ones(canvas)
    for view in foreground:
        transparency *= 1 - total_of([view], canvas)
    return 1 - transparency
