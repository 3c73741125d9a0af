"""A picture at another size: by an upscaler model where it has to grow and there is one, the rest by Lanczos."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_upscaler import TILE, Enlarging, upscaled

MOST = 3  # times that a model is used on one picture


def enlarge(
    picture: Image.Image,
    size: tuple[int, int],
    upscaler: Enlarging | None = None,
    progress: Progress | None = None,
    tile: int = TILE,
) -> Image.Image:
    """An RGB picture at `size`, (width, height) in px.

    The model is used until both sides are large enough, at most three times; a side that is large enough already is
    brought to its size first. `progress` is told of the model's tiles, of `tile` px of the picture; what it raises ends
    the work.
    """
    times = passes(picture.size, size, upscaler.scale) if upscaler else 0
    for done in range(times):
        picture = _resized(picture, tuple(map(min, picture.size, size)))
        told = progress and partial(_tell, progress, done, times)
        picture = Image.fromarray(upscaled(np.asarray(picture), upscaler, tile, progress=told))
    return _resized(picture, size)


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
