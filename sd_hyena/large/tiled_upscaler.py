"""A network that enlarges pictures, worked through in tiles, so that memory does not grow with the picture but for the result.

Tiles overlap. Of an overlap a quarter on each side, where a tile does not see what lies behind its border, is dropped; over
the rest one tile fades into the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sd_hyena.large.progress import Progress, bar
from sd_hyena.large.tiling import Rect, grid, weights
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.ranks import say

TILE, OVERLAP = 256, 32  # px of the small picture
SMALLEST = 32  # below which memory is not the tile's fault
CELL = 16  # px by which tiles are laid: what attends in windows of 8 or 16 px has the same ones in every tile


class Enlarging(Protocol):
    """A network that makes pictures `scale` times as large, best of sides that are multiples of `multiple` px."""

    @property
    def scale(self) -> int: ...

    @property
    def multiple(self) -> int: ...

    def at_work(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """What makes (1, 3, H, W) in 0 ... 1 into (1, 3, scale·H, scale·W), float32 on the CPU."""


def upscaled(
    pixels: np.ndarray,
    network: Enlarging,
    tile: int = TILE,
    overlap: int = OVERLAP,
    progress: Progress | None = None,
) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (scale·H, scale·W, 3). Where memory runs out, in tiles of half the side.

    tile, overlap: in px of `pixels`. What `progress` raises ends the work within a tile.
    """
    height, width = (network.scale * n for n in pixels.shape[:2])
    while True:
        try:
            result, done = np.empty((height, width, 3), np.uint8), 0
            for band in bands(pixels, network, tile, overlap, progress):
                rows = (band.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
                result[done : done + len(rows)] = rows
                done += len(rows)
            return result
        except RuntimeError as error:
            if not is_out_of_memory(error) or tile <= SMALLEST:
                raise
        tile = max(tile // 2, SMALLEST)
        release()
        say(f"out of memory: enlarging in tiles of {tile} px")


def bands(
    pixels: np.ndarray,
    network: Enlarging,
    tile: int = TILE,
    overlap: int = OVERLAP,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The same as float32 bands (3, h, scale·W) from the top to the bottom, each as soon as no tile is to come for it."""
    (height, width), scale = pixels.shape[:2], network.scale
    cell = math.lcm(CELL, network.multiple)
    side = max(tile // cell, 1)
    shared = min(-(-overlap // cell), side - 1)
    tiles = grid((-(-height // cell), -(-width // cell)), (side, side), shared)
    margin = shared * cell // 4
    fade = shared * cell - 2 * margin
    rows = [list(row) for _, row in groupby(tiles, key=lambda rect: rect.top)]
    sums, first = torch.zeros(4, 0, scale * width), 0  # colours by weight, and weight, of the rows from `first` on
    with network.at_work() as enlarge, torch.no_grad(), bar(len(tiles), "tile", progress) as tell:
        for i, row in enumerate(rows):
            bottom = min((row[0].top + row[0].height) * cell, height)
            missing = scale * (bottom - first) - sums.shape[1]
            sums = torch.cat([sums, sums.new_zeros(4, missing, scale * width)], 1)
            for j, rect in enumerate(row, start=1):
                seen = _clipped(Rect(*(cell * n for n in rect)), (height, width))
                part = _without_margin(seen, (height, width), margin)
                x = torch.from_numpy(pixels[_rows(seen), _columns(seen)].copy()).movedim(-1, 0)[None] / 255
                inside = Rect(part.top - seen.top, part.left - seen.left, part.height, part.width)
                y = enlarge(x)[0][:, _rows(inside, scale), _columns(inside, scale)]
                weight = weights("ramp", *y.shape[1:], scale * fade)
                there = sums[:, _rows(part._replace(top=part.top - first), scale), _columns(part, scale)]
                there[:3] += weight * y
                there[3] += weight
                tell(i * len(row) + j, len(tiles))
            until = min(rows[i + 1][0].top * cell, height) if i + 1 < len(rows) else height
            done = scale * (until - first)
            yield sums[:3, :done] / sums[3:, :done]
            sums, first = sums[:, done:].clone(), until


def _clipped(rect: Rect, canvas: tuple[int, int]) -> Rect:
    """The last cell of an axis may reach over the picture."""
    return rect._replace(height=min(rect.height, canvas[0] - rect.top), width=min(rect.width, canvas[1] - rect.left))


def _without_margin(rect: Rect, canvas: tuple[int, int], margin: int) -> Rect:
    """Less what lies at a border of the rectangle that is none of the picture's."""
    top, left = (margin * (start > 0) for start in rect[:2])
    bottom = margin * (rect.top + rect.height < canvas[0])
    right = margin * (rect.left + rect.width < canvas[1])
    return Rect(rect.top + top, rect.left + left, rect.height - top - bottom, rect.width - left - right)


def _rows(rect: Rect, scale: int = 1) -> slice:
    return slice(scale * rect.top, scale * (rect.top + rect.height))


def _columns(rect: Rect, scale: int = 1) -> slice:
    return slice(scale * rect.left, scale * (rect.left + rect.width))
