"""A picture at another size: by an upscaler model where it has to grow and there is one, the rest by Lanczos."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_upscaler import TILE, Enlarging, upscaled

BEHIND = 16  # pixels, at least, that a circular picture goes on behind its borders
LANCZOS = 3  # pixels of the result that its kernel sees on each side
MOST = 3  # times that a model is used on one picture


def enlarge(
    picture: Image.Image,
    size: tuple[int, int],
    upscaler: Enlarging | None = None,
    progress: Progress | None = None,
    tile: int = TILE,
    circular: bool = False,
) -> Image.Image:
    """A picture, of any mode without an upscaler and else RGB, at `size`, (width, height) in px.

    The model is used until both sides are large enough, at most three times; a side that is large enough already is
    brought to its size first. `progress` is told of the model's tiles, of `tile` px of the picture; what it raises ends
    the work. A `circular` picture goes on at its opposite sides.
    """
    if circular:
        return _round(picture, size, upscaler, progress, tile)
    times = passes(picture.size, size, upscaler.scale) if upscaler else 0
    for done in range(times):
        picture = _resized(picture, tuple(map(min, picture.size, size)))
        told = progress and partial(_tell, progress, done, times)
        picture = Image.fromarray(upscaled(np.asarray(picture), upscaler, tile, progress=told))
    return _resized(picture, size)


def _round(
    picture: Image.Image, size: tuple[int, int], upscaler: Enlarging | None, progress: Progress | None, tile: int
) -> Image.Image:
    """A circular one, which shows what lies behind its borders while it is enlarged."""
    if picture.size == size:
        return picture
    margins = [min(max(BEHIND, -(-LANCZOS * own // side)), own) for own, side in zip(picture.size, size, strict=True)]
    pixels = np.asarray(picture)
    around = [(margins[1],) * 2, (margins[0],) * 2, (0, 0)][: pixels.ndim]
    wide = Image.fromarray(np.pad(pixels, around, mode="wrap"))
    if count := passes(picture.size, size, upscaler.scale) if upscaler else 0:
        wide = enlarge(wide, tuple(upscaler.scale**count * side for side in wide.size), upscaler, progress, tile)
    times = wide.width / (picture.width + 2 * margins[0])
    start = [times * margin for margin in margins]
    box = (*start, *(from_ + times * side for from_, side in zip(start, picture.size, strict=True)))
    return wide.resize(size, Image.Resampling.LANCZOS, box)


def passes(size: tuple[int, int], wanted: tuple[int, int], scale: int) -> int:
    """How often a model of this scale is used."""
    count = 0
    while count < MOST and any(scale**count * n < side for n, side in zip(size, wanted, strict=True)):
        count += 1
    return count


def _tell(progress: Progress, before: int, times: int, done: int, total: int) -> None:
    progress(before * total + done, times * total)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
