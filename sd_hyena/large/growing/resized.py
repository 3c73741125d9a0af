"""A map at another size, whose borders are the end of it or meet."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from sd_hyena.large.tiling import Size

REACH = 2  # cells that the widest kernel, the cubic one, sees beyond a border


def resized(x: Tensor, size: Size, mode: str = "bicubic", circular: bool = False) -> Tensor:
    """(B, C, H, W) to another (H, W); itself where that is its own.

    Beyond a border lies the border's own cell, of a circular map that on the opposite side.
    """
    own = tuple(x.shape[-2:])
    if own == tuple(size):
        return x
    corners = {"align_corners": False} if mode in ("bicubic", "bilinear") else {}
    if not circular:
        return F.interpolate(x, tuple(size), mode=mode, **corners)
    pairs = [_margins(side, other) for side, other in zip(own, size, strict=True)]
    (top, above), (left, before) = pairs
    x = F.interpolate(
        F.pad(x, (left, left, top, top), "circular"),
        (size[0] + 2 * above, size[1] + 2 * before),
        mode=mode,
        **corners,
    )
    return x[..., above : above + size[0], before : before + size[1]]


def _margins(side: int, other: int) -> tuple[int, int]:
    """How many cells, before and after, leave each cell of the result where it would be without them."""
    common = math.gcd(side, other)
    times = min(-(-REACH * common // side), common)
    return times * side // common, times * other // common
